"""Sealing a store: gathering what the commits say into dataset.json and the index."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from latentmill.config import fingerprint
from latentmill.errors import StorageError
from latentmill.plan import Plan
from latentmill.storage import Storage
from latentmill.store.commit import iter_commits
from latentmill.store.index import Index, to_batch
from latentmill.store.schema import (
    DATASET_PATH,
    INDEX_PATH,
    ORIGIN_PATH,
    Commit,
    DatasetInfo,
    ShardEntry,
    parse_document,
)
from latentmill.store.statistics import ChannelStatistics
from latentmill.version import __version__


def dataset_info(plan: Plan, commits: Iterable[Commit]) -> DatasetInfo:
    """What the plan and the commits so far say of the store; goes through the commits once."""
    document = plan.fingerprint
    statistics = ChannelStatistics.empty(document["model"]["latent_channels"])
    counts: Counter[str] = Counter()
    seconds = 0.0
    shards: list[ShardEntry] = []
    for commit in commits:
        counts.update(item.status for item in commit.items)
        seconds += commit.audio_seconds
        if entry := commit.statistics:
            part = ChannelStatistics(entry.frames, np.array(entry.mean), np.array(entry.m2))
            statistics = statistics.merge(part)
        if commit.shard is not None and commit.hash is not None:
            shards.append(
                ShardEntry(
                    path=commit.shard, rows=commit.rows, bytes=commit.bytes, hash=commit.hash
                )
            )
    chunking = document["chunking"]
    return DatasetInfo(
        latentmill_version=__version__,
        format=plan.format,
        layout="chunks" if chunking["stitch"] == "none" else "time-major",
        dtype=document["settings"]["dtype"],
        model={
            **document["model"],
            "asked": plan.model,
            "options": plan.model_options,
            "asked_channels": plan.channels,
            "provenance": plan.provenance,
        },
        chunking=chunking,
        fingerprint=fingerprint(document),
        source=plan.source,
        items=plan.num_items,
        encoded=counts["encoded"],
        skipped=counts["skipped"],
        failed=counts["failed"],
        hours=round(seconds / 3600, 6),
        frames=statistics.frames,
        mean=statistics.mean.tolist(),
        std=statistics.std.tolist(),
        origin=ORIGIN_PATH,
        shards=shards,
    )


def seal(storage: Storage, plan: Plan) -> DatasetInfo:
    """Write the index, then dataset.json, from the commits of the plan's units, one at a time."""
    names = {unit.name for unit in plan.units}
    batches = []

    def commits() -> Iterator[Commit]:
        for commit in iter_commits(storage):
            if commit.unit in names:
                batches.append(to_batch(commit))
                yield commit

    info = dataset_info(plan, commits())
    info = info.model_copy(update=_measured(storage, info.fingerprint))
    storage.write(INDEX_PATH, Index.from_batches(batches).to_bytes())
    storage.write(DATASET_PATH, info.model_dump_json(indent=2).encode())
    return info


def _measured(storage: Storage, fingerprint: str) -> dict[str, Any]:
    """What was measured of these latents before: a longer plan does not undo it."""
    data = storage.read_if_exists(DATASET_PATH)
    if data is None:
        return {}
    before = parse_document(DatasetInfo, data, DATASET_PATH, "delete it and run again")
    if before.fingerprint != fingerprint:
        return {}
    return {"seams": before.seams, "linearity": before.linearity}


def write_origin(storage: Storage, origin: npt.NDArray[np.float32]) -> None:
    """Store E(0) of one chunk, `[D, Z]`."""
    buffer = io.BytesIO()
    np.save(buffer, origin, allow_pickle=False)
    storage.write(ORIGIN_PATH, buffer.getvalue())


def read_origin(storage: Storage) -> npt.NDArray[np.float32]:
    """E(0) of one chunk, `[D, Z]`.

    Raises:
        StorageError: It is missing or damaged.
    """
    data = storage.read(ORIGIN_PATH)
    try:
        origin: npt.NDArray[np.float32] = np.load(io.BytesIO(data), allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise StorageError(
            f"{storage.root}/{ORIGIN_PATH} is damaged: restore it from a copy of the store."
        ) from error
    return origin
