"""The pass over the shards of a store that `statistics` needs, one shard at a time.

Shards are independent of each other, so the pass can be divided among processes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import xxhash

from latentmill.encoding.loudness import SILENT_DB, silent_frames
from latentmill.errors import StorageError
from latentmill.evaluation.channels import ChannelMoments, Pooling
from latentmill.evaluation.rows import ShardRows
from latentmill.record import DTYPES
from latentmill.sources.address import format_at, item_at
from latentmill.store.describe import changed_meanwhile
from latentmill.store.schema import levels_of
from latentmill.store.store import LatentStore

BLOCK_BYTES = 2 << 20  # of latents that are processed at once: they fit into the cache
_COUNTED = ("source_sample_rate", "source_channels")
_FIELDS = ("content_hash", "source_uri", "rms", "peak", "levels")


@dataclass(frozen=True)
class RecordTable:
    """What the pass finds out about each record, a row each.

    Attributes:
        files: Hash of the source file and the segment of it.
        audio: Hash of the length and the levels, equal for equal audio.
        rms: RMS of the samples.
        silent: Whether all of the record is silent.
        positions, shapes: The vectors of `Pooling`.
    """

    files: npt.NDArray[np.uint64]
    audio: npt.NDArray[np.uint64]
    rms: npt.NDArray[np.float64]
    silent: npt.NDArray[np.bool_]
    positions: npt.NDArray[np.float16]
    shapes: npt.NDArray[np.float16]

    @classmethod
    def of(cls, records: int, pooling: Pooling) -> RecordTable:
        """A table of zeros."""
        return cls(
            files=np.zeros(records, np.uint64),
            audio=np.zeros(records, np.uint64),
            rms=np.zeros(records),
            silent=np.zeros(records, bool),
            positions=np.zeros((records, pooling.SIZE), np.float16),
            shapes=np.zeros((records, pooling.bands), np.float16),
        )

    def fill(self, rows: npt.NDArray[np.int64], part: RecordTable) -> None:
        """Copy the rows of `part` into these rows."""
        for column in fields(self):
            getattr(self, column.name)[rows] = getattr(part, column.name)


@dataclass
class ShardTotals:
    """What the pass sums up over shards."""

    moments: ChannelMoments
    formats: Counter[str]
    sample_rates: Counter[str]
    source_channels: Counter[str]
    silent_frames: int = 0
    measured_frames: int = 0

    @classmethod
    def of(cls, store: LatentStore) -> ShardTotals:
        return cls(ChannelMoments(store.mean), Counter(), Counter(), Counter())

    def add(self, other: ShardTotals) -> None:
        self.moments.merge(other.moments)
        self.formats += other.formats
        self.sample_rates += other.sample_rates
        self.source_channels += other.source_channels
        self.silent_frames += other.silent_frames
        self.measured_frames += other.measured_frames


@dataclass(frozen=True)
class ShardResult:
    """The pass over one shard: the positions of its records in the index, and what it found."""

    at: npt.NDArray[np.int64]
    records: RecordTable
    totals: ShardTotals


class ShardPass:
    """Reads one shard after the other.

    Small when pickled. Unpickling raises a StoreError if the store was sealed again since.
    """

    def __init__(self, store: LatentStore, index_hash: str | None = None) -> None:
        self.store = store
        if index_hash is not None and store.info.index_hash != index_hash:
            raise changed_meanwhile(store)

    def __reduce__(self) -> tuple[type[ShardPass], tuple[LatentStore, str | None]]:
        return ShardPass, (self.store, self.store.info.index_hash)

    @cached_property
    def rows(self) -> ShardRows:
        return ShardRows(self.store)

    @cached_property
    def pooling(self) -> Pooling:
        """Records are compared without the latent of silence."""
        frames = self.store.origin.frames
        return Pooling(frames[:, frames.shape[1] // 2])

    def __call__(self, shard: int) -> ShardResult:
        """Read a shard.

        Raises:
            StorageError: A latent is damaged.
        """
        at = self.rows.positions(shard)
        table, totals = RecordTable.of(len(at), self.pooling), ShardTotals.of(self.store)
        self._read_fields(shard, at, table, totals)
        for rows in self._blocks(at):
            frames, lengths, owners = self._latents(shard, at[rows])
            whole = torch.from_numpy(np.concatenate(frames).astype(np.float32, copy=False))
            totals.moments.add(whole, lengths, table.silent[rows][owners])
            of_record = np.add.reduceat(lengths, np.flatnonzero(np.diff(owners, prepend=-1)))
            table.positions[rows], table.shapes[rows] = self.pooling(whole, of_record)
        return ShardResult(at, table, totals)

    def _read_fields(
        self, shard: int, at: npt.NDArray[np.int64], table: RecordTable, totals: ShardTotals
    ) -> None:
        fields = self.rows.fields(shard, (*_FIELDS, *_COUNTED))
        samples = self.store.index.column("num_samples")[at]
        table.rms[:] = fields["rms"]
        for row, (digest, uri, rms, peak, levels) in enumerate(
            zip(*(fields[name] for name in _FIELDS), strict=True)
        ):
            segment = item_at(uri).segment if "#" in uri else None
            table.files[row] = xxhash.xxh3_64_intdigest(f"{digest} {segment}".encode())
            levels = levels_of({"levels": levels})  # noqa: PLW2901
            text = f"{samples[row]} {rms:.6e} {peak:.6e}".encode()
            table.audio[row] = xxhash.xxh3_64_intdigest(text + (levels or b""))
            totals.formats[format_at(uri)] += 1
            if levels is None:
                table.silent[row] = rms < 10 ** (SILENT_DB / 20)
                continue
            below = silent_frames(levels)
            table.silent[row] = below.all()
            totals.silent_frames += int(below.sum())
            totals.measured_frames += len(below)
        totals.sample_rates.update(map(str, fields["source_sample_rate"]))
        totals.source_channels.update(map(str, fields["source_channels"]))

    def _blocks(self, at: npt.NDArray[np.int64]) -> Iterator[slice]:
        """Divide the rows of a shard into parts of limited size."""
        ends = np.cumsum(self.store.index.column("length")[at]) // BLOCK_BYTES
        borders = [0, *(np.flatnonzero(np.diff(ends)) + 1).tolist(), len(at)]
        yield from map(slice, borders[:-1], borders[1:])

    def _latents(
        self, shard: int, at: npt.NDArray[np.int64]
    ) -> tuple[list[npt.NDArray[Any]], npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Frames `[F, D]` of each record or chunk, their numbers, and the row of each in `at`."""
        path, column = self.rows.paths[shard], self.store.index.column
        offsets, sizes, chunks = (column(n)[at].tolist() for n in ("offset", "length", "chunks"))
        pieces = [(path, offset, size) for offset, size in zip(offsets, sizes, strict=True)]
        channels, dtype = len(self.store.mean), DTYPES[self.store.info.dtype]
        hashes = column("hash")[at]
        frames, owners = [], []
        for row, (data, count) in enumerate(
            zip(self.store.storage.read_ranges(pieces), chunks, strict=True)
        ):
            fits = not len(data) % (channels * max(1, count) * np.dtype(dtype).itemsize)
            if not data or not fits or xxhash.xxh3_64_intdigest(data) != hashes[row]:
                raise StorageError(
                    f"The latent of {self.store.index.key(at[row])} in {self.store.url} is "
                    "damaged: run `latentmill verify` to find all damaged records."
                )
            values = np.frombuffer(data, dtype)
            if count:
                for chunk in values.reshape(count, channels, -1):
                    whole = chunk[:, : used_frames(chunk)]
                    frames.append(np.ascontiguousarray(whole.T))
                    owners.append(row)
            else:
                frames.append(values.reshape(-1, channels))
                owners.append(row)
        return frames, np.array([len(f) for f in frames]), np.array(owners)


def used_frames(chunk: npt.NDArray[Any]) -> int:
    """Number of frames of a chunk without the zeros that pad a short last one."""
    nonzero = np.flatnonzero(chunk.any(axis=0))
    return int(nonzero[-1]) + 1 if len(nonzero) else chunk.shape[1]
