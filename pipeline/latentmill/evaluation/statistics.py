"""Statistics of a store: channels, loudness, silence, duplicates, outliers.

What the commits and the index know is taken from them; one pass over the shards does the rest.
"""

from __future__ import annotations

import importlib.util
import itertools
import math
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import xxhash

from latentmill.encoding.loudness import LOUDEST, STEPS_PER_DB
from latentmill.errors import ConfigError, ItemError, StorageError
from latentmill.evaluation.channels import ChannelMoments, Pooled
from latentmill.evaluation.rows import ShardRows
from latentmill.evaluation.similarity import equal_groups, joined, near_pairs, outliers
from latentmill.record import DTYPES
from latentmill.sources.address import item_at
from latentmill.store.measurement import write_measurement
from latentmill.store.results import NearDuplicates, Outlier, StoreStatistics
from latentmill.store.schema import levels_of
from latentmill.store.store import LatentStore
from latentmill.store.verify import read_source
from latentmill.text.log import get_logger

SILENT_DB = -60.0
SATURATED = 0.01
MAX_LISTED = 1000
BLOCK_BYTES = 2 << 20  # of latents that are processed at once: they fit into the cache
LUFS_SECONDS = 300.0
QUANTILES = {"least": 0.0, "5 %": 0.05, "median": 0.5, "95 %": 0.95, "most": 1.0}
_FIELDS = ("content_hash", "source_uri", "source_sample_rate", "source_channels")
_LEVELS = ("rms", "peak", "levels")

_log = get_logger("evaluation")


def measure_statistics(
    store: LatentStore, *, items: int = 32, max_seconds: float | None = None, record: bool = True
) -> StoreStatistics:
    """Describe the contents of a store; reads all latents once.

    The integrated loudness is measured on `items` records whose source can be read, at most
    `max_seconds` of each (default 300), if pyloudnorm is installed. `record` writes the result into
    a sealed store's evaluation/statistics.json.
    """
    if store.codes:
        raise ConfigError(f"{store.url} contains codes, which have no statistics.")
    if not len(store):
        raise ConfigError(f"{store.url} has no records: encode some items first.")
    reading = _Reading(store)
    for shard in range(len(reading.rows.paths)):
        reading.read(shard)
        if shard % 50 == 49:
            _log.info("statistics: %d of %d shards", shard + 1, len(reading.rows.paths))
    lufs = _lufs(store, items, max_seconds or LUFS_SECONDS)
    result = reading.result(lufs)
    if record and store.sealed:
        write_measurement(store.storage, store.info, result)
    return result


class _Reading:
    """What the pass over the shards collects, by position in the index."""

    def __init__(self, store: LatentStore) -> None:
        self._store, self.rows = store, ShardRows(store)
        count = len(store)
        origin = store.origin
        middle = origin.frames[:, origin.frames.shape[1] // 2]
        self._moments = ChannelMoments(store.mean)
        self._pooled = Pooled(count, middle)
        self._files, self._audio = np.zeros(count, np.uint64), np.zeros(count, np.uint64)
        self._rms = np.zeros(count)
        self._silent = np.zeros(count, bool)
        self._silent_frames = self._measured_frames = 0
        self._counts: dict[str, Counter[str]] = {
            name: Counter() for name in ("sample_rates", "source_channels", "formats")
        }

    def read(self, shard: int) -> None:
        positions = self.rows.positions(shard)
        fields = self.rows.fields(shard, (*_FIELDS, *_LEVELS))
        self._fields(positions, fields)
        for part in self._blocks(positions):
            frames, lengths, owners = self._latents(shard, part)
            whole = torch.from_numpy(np.concatenate(frames).astype(np.float32, copy=False))
            self._moments.add(whole, lengths, self._silent[owners])
            self._pooled.add(part, whole, _per_record(lengths, owners, part))

    def _fields(self, positions: npt.NDArray[np.int64], fields: dict[str, list[Any]]) -> None:
        samples = self._store.index.column("num_samples")
        quiet = LOUDEST + STEPS_PER_DB * SILENT_DB
        self._rms[positions] = fields["rms"]
        for at, digest, uri, rms, peak, levels in zip(
            positions.tolist(),
            *(fields[n] for n in ("content_hash", "source_uri", "rms", "peak", "levels")),
            strict=True,
        ):
            name, _, part = uri.rpartition("#") if "#" in uri else (uri, "", "")
            segment = item_at(uri).segment if part else None
            self._files[at] = xxhash.xxh3_64_intdigest(f"{digest} {segment}".encode())
            levels = levels_of({"levels": levels})  # noqa: PLW2901
            text = f"{samples[at]} {rms:.6e} {peak:.6e}".encode()
            self._audio[at] = xxhash.xxh3_64_intdigest(text + (levels or b""))
            self._counts["formats"][PurePosixPath(name).suffix.lower().lstrip(".") or "none"] += 1
            if levels is None:
                self._silent[at] = rms < 10 ** (SILENT_DB / 20)
                continue
            below = np.frombuffer(levels, np.uint8) < quiet
            self._silent[at] = below.all()
            self._silent_frames += int(below.sum())
            self._measured_frames += len(below)
        self._counts["sample_rates"].update(map(str, fields["source_sample_rate"]))
        self._counts["source_channels"].update(map(str, fields["source_channels"]))

    def _blocks(self, positions: npt.NDArray[np.int64]) -> Iterator[npt.NDArray[np.int64]]:
        """Divide the records of a shard into parts of limited size."""
        ends = np.cumsum(self._store.index.column("length")[positions]) // BLOCK_BYTES
        yield from np.split(positions, np.flatnonzero(np.diff(ends)) + 1)

    def _latents(
        self, shard: int, part: npt.NDArray[np.int64]
    ) -> tuple[list[npt.NDArray[Any]], npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Frames `[F, D]` of each record or chunk, their numbers, and the record of each."""
        path, column = self.rows.paths[shard], self._store.index.column
        offsets, sizes, chunks = (column(n)[part].tolist() for n in ("offset", "length", "chunks"))
        pieces = [(path, offset, size) for offset, size in zip(offsets, sizes, strict=True)]
        channels, dtype = len(self._store.mean), DTYPES[self._store.info.dtype]
        hashes = column("hash")
        frames, owners = [], []
        for at, data, count in zip(
            part.tolist(), self._store.storage.read_ranges(pieces), chunks, strict=True
        ):
            fits = not len(data) % (channels * max(1, count) * np.dtype(dtype).itemsize)
            if not data or not fits or xxhash.xxh3_64_intdigest(data) != hashes[at]:
                raise StorageError(
                    f"The latent of {self._store.index.key(at)} in {self._store.url} is damaged: "
                    "run `latentmill verify` to find all damaged records."
                )
            values = np.frombuffer(data, dtype)
            if count:
                for chunk in values.reshape(count, channels, -1):
                    whole = chunk[:, : _used(chunk)]
                    frames.append(np.ascontiguousarray(whole.T))
                    owners.append(at)
            else:
                frames.append(values.reshape(-1, channels))
                owners.append(at)
        return frames, np.array([len(f) for f in frames]), np.array(owners)

    def result(self, lufs: list[float] | None) -> StoreStatistics:
        store, index, moments = self._store, self._store.index, self._moments
        info, key = store.info, index.key
        sounding = ~self._silent
        same_file = equal_groups(self._files, sounding)
        copies = {at for group in same_file for at in group[1:]}
        first = sounding.copy()
        first[list(copies)] = False  # one of each file is compared further
        same_audio = equal_groups(self._audio, first)
        first[[at for group in same_audio for at in group[1:]]] = False
        pairs = near_pairs(self._pooled.positions, index.column("frames"), first)
        near = joined(pairs)
        repeated = {at for records, _ in near for at in records[1:]}
        use = first.copy()
        use[list(repeated)] = False
        seconds = index.column("num_samples") / info.model["sample_rate"]
        power = float(np.mean(np.square(info.std) + np.square(info.mean)))
        deviation = math.sqrt(max(0.0, power - float(np.mean(info.mean)) ** 2))
        saturation = moments.saturation
        silent = np.flatnonzero(self._silent)
        with np.errstate(divide="ignore"):
            loudness = 20 * np.log10(self._rms[sounding & (self._rms > 0)])
        return StoreStatistics(
            records=len(store),
            hours=info.hours,
            frames=info.frames,
            mean=info.mean,
            std=info.std,
            low=moments.low.tolist(),
            high=moments.high.tolist(),
            saturation=saturation.tolist(),
            # Every channel has its largest and its smallest value at least once.
            saturated_channels=np.flatnonzero(
                saturation - 2 / max(1, moments.frames) > SATURATED
            ).tolist(),
            constant_channels=np.flatnonzero(moments.high == moments.low).tolist(),
            effective_rank=moments.effective_rank,
            autocorrelation={str(n): v.tolist() for n, v in moments.autocorrelation.items()},
            suggested_scale=1 / deviation if deviation > 0 else None,
            seconds=_quantiles(seconds),
            rms_db=_quantiles(loudness),
            lufs=None if lufs is None else _quantiles(np.array(lufs)),
            lufs_records=len(lufs or ()),
            **{name: dict(count.most_common()) for name, count in self._counts.items()},
            silence=self._silent_frames / max(1, self._measured_frames),
            silent=[key(at) for at in silent[:MAX_LISTED].tolist()],
            silent_records=len(silent),
            same_file=_named(store, same_file),
            same_audio=_named(store, same_audio),
            near_duplicates=[
                NearDuplicates(keys=[key(at) for at in records], distance=distance)
                for records, distance in near[:MAX_LISTED]
            ],
            outliers=[
                Outlier(key=key(at), distance=distance)
                for at, distance in outliers(self._pooled.shapes, use)[:MAX_LISTED]
            ],
        )


def _per_record(
    lengths: npt.NDArray[np.int64], owners: npt.NDArray[np.int64], part: npt.NDArray[np.int64]
) -> npt.NDArray[np.int64]:
    """Frames of each record, of all its chunks."""
    starts = np.flatnonzero(np.append(True, np.diff(owners) != 0))
    assert len(starts) == len(part)
    return np.add.reduceat(lengths, starts)


def _used(chunk: npt.NDArray[Any]) -> int:
    """Number of frames of a chunk without the zeros that pad a short last one."""
    nonzero = np.flatnonzero(chunk.any(axis=0))
    return int(nonzero[-1]) + 1 if len(nonzero) else chunk.shape[1]


def _named(store: LatentStore, groups: list[list[int]]) -> list[list[str]]:
    return [[store.index.key(at) for at in sorted(group)] for group in groups[:MAX_LISTED]]


def _quantiles(values: npt.NDArray[np.float64]) -> dict[str, float]:
    if not len(values):
        return {}
    found = np.quantile(values, list(QUANTILES.values())).tolist()
    return dict(zip(QUANTILES, found, strict=True))


def _lufs(store: LatentStore, items: int, longest: float) -> list[float] | None:
    """Integrated loudness of some records, by ITU-R BS.1770; None without pyloudnorm."""
    if importlib.util.find_spec("pyloudnorm") is None:
        return None
    import pyloudnorm

    step = max(1, len(store) // items)
    found = []
    for key in itertools.islice(store.keys(), 0, step * items, step):
        record = store[key]
        rate, channels = record.sample_rate, min(record.source_channels, 2)
        try:
            audio = read_source(record, channels, round(longest * rate))
        except ItemError:
            continue
        if audio.shape[1] < 0.4 * rate:  # shorter than one block of the standard
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            loudness = pyloudnorm.Meter(rate).integrated_loudness(audio.T.astype(np.float64))
        if math.isfinite(loudness):
            found.append(float(loudness))
    return found
