"""Statistics of a store: channels, loudness, silence, duplicates, outliers.

What the commits and the index know is taken from them; one pass over the shards does the rest.
"""

from __future__ import annotations

import importlib.util
import math
import os
import warnings
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from latentmill.errors import ConfigError, ItemError
from latentmill.evaluation.shard_pass import RecordTable, ShardPass, ShardResult, ShardTotals
from latentmill.evaluation.similarity import find_repeats, outliers
from latentmill.evaluation.vectors import remove_other_vectors, write_vectors
from latentmill.store.describe import changed_meanwhile
from latentmill.store.index import Index
from latentmill.store.measurement import recording, write_measurement
from latentmill.store.results import NearDuplicates, Outlier, StoreStatistics
from latentmill.store.spread import spread_rows
from latentmill.store.store import LatentStore
from latentmill.store.verify import read_source
from latentmill.text.log import get_logger

SATURATED = 0.01
MAX_LISTED = 1000
LUFS_SECONDS = 300.0
QUANTILES = {"least": 0.0, "5 %": 0.05, "median": 0.5, "95 %": 0.95, "most": 1.0}

_log = get_logger("evaluation")


def measure_statistics(
    store: LatentStore,
    *,
    items: int = 32,
    max_seconds: float | None = None,
    address: str | None = None,
    record: bool = True,
) -> StoreStatistics:
    """Describe the contents of a store; reads all latents once.

    The integrated loudness is measured on `items` records whose source can be read, at most
    `max_seconds` of each (default 300), if pyloudnorm is installed. With the `address` of a Ray
    cluster (default RAY_ADDRESS), its nodes read the shards, one task for each. `record` writes the
    result into a sealed store's evaluation/statistics.json.
    """
    if store.codes:
        raise ConfigError(
            f"{store.url} contains codes, which have no statistics: use a store of latents."
        )
    if not len(store):
        raise ConfigError(f"{store.url} has no records: encode some items first.")
    info, index, shard_pass = store.info, store.index, ShardPass(store)
    count = len(shard_pass.rows.paths)
    table, totals = RecordTable.of(len(store), shard_pass.pooling), ShardTotals.of(store)
    for number, shard in enumerate(_results(shard_pass, count, address), 1):
        table.fill(shard.at, shard.records)
        totals.add(shard.totals)
        if number % 50 == 0:
            _log.info("statistics: %d of %d shards", number, count)
    lufs = _lufs(store, index, items, max_seconds or LUFS_SECONDS)
    if store.index is not index:  # the table has rows of the earlier one
        raise changed_meanwhile(store)
    result = _result(store, table, totals, lufs)
    if record and store.sealed:
        with recording():
            store.storage.clear_scratch()  # of a measurement that was killed
            vectors = write_vectors(store.storage, table.positions, table.shapes)
            result = result.model_copy(update={"vectors": vectors})
            write_measurement(store.storage, info, result)
            remove_other_vectors(store.storage, vectors)
    return result


def _results(shard_pass: ShardPass, count: int, address: str | None) -> Iterator[ShardResult]:
    """The results of all shards in order, so that sums are the same wherever they are read."""
    if address is None and "RAY_ADDRESS" not in os.environ:
        return map(shard_pass, range(count))
    if not shard_pass.store.sealed:
        raise ConfigError(
            f"{shard_pass.store.url} is not sealed yet, so a cluster could read it in different "
            "states: finish its run first, or leave the address out."
        )
    from latentmill.engine.tasks import map_in_tasks

    return map_in_tasks(shard_pass, range(count), address)


def _result(
    store: LatentStore, table: RecordTable, totals: ShardTotals, lufs: list[float] | None
) -> StoreStatistics:
    index, moments = store.index, totals.moments
    info, key = store.info, index.key
    sounding = ~table.silent
    repeats = find_repeats(table, index.column("frames"), sounding)
    seconds = index.column("num_samples") / info.model["sample_rate"]
    deviations = store.origin.deviations
    rows = len(info.mean) - deviations
    mean, std = np.array(info.mean[:rows]), np.array(info.std[:rows])
    power = float(np.mean(np.square(std) + np.square(mean)))
    deviation = math.sqrt(max(0.0, power - float(np.mean(mean)) ** 2))
    saturation = moments.saturation
    silent = np.flatnonzero(table.silent)
    unusual = outliers(table.shapes, repeats.others)
    with np.errstate(divide="ignore"):
        loudness = 20 * np.log10(table.rms[sounding & (table.rms > 0)])
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
        deviations=deviations,
        effective_rank=moments.effective_rank(rows),
        autocorrelation={str(n): v.tolist() for n, v in moments.autocorrelation.items()},
        suggested_scale=1 / deviation if deviation > 0 else None,
        seconds=_quantiles(seconds),
        rms_db=_quantiles(loudness),
        lufs=None if lufs is None else _quantiles(np.array(lufs)),
        lufs_records=len(lufs or ()),
        formats=dict(totals.formats.most_common()),
        sample_rates=dict(totals.sample_rates.most_common()),
        source_channels=dict(totals.source_channels.most_common()),
        silence=totals.silent_frames / max(1, totals.measured_frames),
        silent=[key(at) for at in silent[:MAX_LISTED].tolist()],
        silent_records=len(silent),
        same_file=_named(store, repeats.same_file),
        same_file_groups=len(repeats.same_file),
        same_audio=_named(store, repeats.same_audio),
        same_audio_groups=len(repeats.same_audio),
        near_duplicates=[
            NearDuplicates(keys=[key(at) for at in records], distance=distance)
            for records, distance in repeats.near[:MAX_LISTED]
        ],
        near_duplicate_groups=len(repeats.near),
        outliers=[Outlier(key=key(at), distance=distance) for at, distance in unusual[:MAX_LISTED]],
        outlier_records=len(unusual),
    )


def _named(store: LatentStore, groups: list[list[int]]) -> list[list[str]]:
    return [[store.index.key(at) for at in sorted(group)] for group in groups[:MAX_LISTED]]


def _quantiles(values: npt.NDArray[np.float64]) -> dict[str, float]:
    if not len(values):
        return {}
    found = np.quantile(values, list(QUANTILES.values())).tolist()
    return dict(zip(QUANTILES, found, strict=True))


def _lufs(store: LatentStore, index: Index, items: int, longest: float) -> list[float] | None:
    """Integrated loudness of some records, by ITU-R BS.1770; None without pyloudnorm."""
    if importlib.util.find_spec("pyloudnorm") is None:
        return None
    import pyloudnorm

    found = []
    for row in spread_rows(len(index), items):
        record = store.read(index.entry(row))
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
