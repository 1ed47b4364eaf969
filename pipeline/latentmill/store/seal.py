"""Sealing a store: gathering what the commits say into dataset.json and the index."""

from __future__ import annotations

import io
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from latentmill.config import fingerprint
from latentmill.plan import Plan
from latentmill.storage import Storage
from latentmill.store.index import Index
from latentmill.store.schema import (
    DATASET_PATH,
    INDEX_PATH,
    ORIGIN_PATH,
    Commit,
    DatasetInfo,
    ShardEntry,
)
from latentmill.store.statistics import ChannelStatistics
from latentmill.version import __version__


def dataset_info(plan: Plan, commits: Mapping[str, Commit]) -> DatasetInfo:
    """What the plan and the commits so far say of the store."""
    document = plan.fingerprint
    statistics = ChannelStatistics.empty(document["model"]["latent_channels"])
    for commit in commits.values():
        if entry := commit.statistics:
            part = ChannelStatistics(entry.frames, np.array(entry.mean), np.array(entry.m2))
            statistics = statistics.merge(part)
    chunking = document["chunking"]
    return DatasetInfo(
        latentmill_version=__version__,
        format=plan.format,
        layout="chunks" if chunking["stitch"] == "none" else "time-major",
        dtype=document["settings"]["dtype"],
        model={**document["model"], "options": plan.model_options},
        chunking=chunking,
        fingerprint=fingerprint(document),
        source=plan.source,
        items=plan.num_items,
        encoded=sum(commit.count("encoded") for commit in commits.values()),
        skipped=sum(commit.count("skipped") for commit in commits.values()),
        failed=sum(commit.count("failed") for commit in commits.values()),
        hours=round(sum(commit.audio_seconds for commit in commits.values()) / 3600, 6),
        frames=statistics.frames,
        mean=statistics.mean.tolist(),
        std=statistics.std.tolist(),
        origin=ORIGIN_PATH,
        shards=[
            ShardEntry(path=c.shard, rows=c.rows, bytes=c.bytes, hash=c.hash or "")
            for c in commits.values()
            if c.shard is not None
        ],
    )


def seal(storage: Storage, plan: Plan, commits: Mapping[str, Commit]) -> DatasetInfo:
    """Write the index, then dataset.json."""
    info = dataset_info(plan, commits)
    storage.write(INDEX_PATH, Index.from_commits(commits.values()).to_bytes())
    storage.write(DATASET_PATH, info.model_dump_json(indent=2).encode())
    return info


def write_origin(storage: Storage, origin: npt.NDArray[np.float32]) -> None:
    """Store E(0) of one chunk, `[D, Z]`."""
    buffer = io.BytesIO()
    np.save(buffer, origin, allow_pickle=False)
    storage.write(ORIGIN_PATH, buffer.getvalue())
