"""One pass over a shard checks its hash and all of its records."""

from __future__ import annotations

import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from latentmill.record import Outcome
from latentmill.storage.storage import Storage
from latentmill.store import verify_shard
from latentmill.store.commit import write_unit
from latentmill.store.schema import Commit
from latentmill.store.store import LatentStore
from latentmill.store.verify_shard import shard_faults
from support.latent_store import write_latents

FORMATS = ["parquet", "webdataset"]


def written(folder: Path, format_name: str) -> tuple[LatentStore, Commit]:
    """A unit whose shard has the records in another order than the plan, two of them with NaN."""
    store = write_latents(str(folder), [9, 30, 200, 3, 70], format_name=format_name)
    records = list(store)
    for number in (1, 3):
        latent = np.array(records[number].latent)
        latent[2, 1] = np.nan
        records[number] = replace(records[number], latent=latent)
    commit = write_unit(
        store.storage,
        "000000",
        [Outcome(one.key, "encoded", record=one) for one in reversed(records)],
        format_name=format_name,
        fingerprint=store.info.fingerprint,
        info={},
        revision=1,
        keys=[one.key for one in records],
    )
    return store, commit


@pytest.mark.parametrize("format_name", FORMATS)
@pytest.mark.parametrize("block", [1, 100, 5000, 1 << 22])
def test_blocks_may_end_anywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, format_name: str, block: int
) -> None:
    store, commit = written(tmp_path, format_name)
    assert commit.shard is not None

    def refuse(self: Storage, path: str, offset: int, length: int) -> bytes:
        raise AssertionError("a record is read on its own")

    monkeypatch.setattr(verify_shard, "HASH_BLOCK", block)
    monkeypatch.setattr(Storage, "read_range", refuse)
    assert shard_faults(store, commit.shard, commit) == [
        "the latent of item/00001 contains NaN or Inf",
        "the latent of item/00003 contains NaN or Inf",
    ]


@pytest.mark.parametrize("format_name", FORMATS)
def test_records_that_are_not_where_the_commit_has_them(tmp_path: Path, format_name: str) -> None:
    """Beyond the shard, over another record, and of a length that reaches beyond the shard."""
    store, commit = written(tmp_path, format_name)
    changed = [item.model_dump() for item in commit.items]
    changed[0]["offset"] = commit.bytes + 5
    changed[2]["offset"] = changed[4]["offset"]
    changed[4]["length"] = 1 << 40
    faults = shard_faults(
        store, commit.shard or "", Commit(**{**commit.model_dump(), "items": changed})
    )
    whats = ["truncated", "NaN", "not match its hash", "NaN", "truncated"]
    for number, (fault, what) in enumerate(zip(faults, whats, strict=True)):
        assert f"item/0000{number}" in fault
        assert what in fault


@pytest.mark.parametrize("format_name", FORMATS)
def test_records_of_a_shard_that_is_not_whole_are_not_reported(
    tmp_path: Path, format_name: str
) -> None:
    store, commit = written(tmp_path, format_name)
    path = tmp_path / (commit.shard or "")
    data = bytearray(path.read_bytes())
    data[-9] ^= 1
    path.write_bytes(data)
    (fault,) = shard_faults(store, commit.shard or "", commit)
    assert "does not match the hash in its commit: restore the shard from a copy" in fault


@pytest.mark.parametrize("format_name", FORMATS)
def test_a_large_shard_is_not_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, format_name: str
) -> None:
    store = write_latents(
        str(tmp_path), [512] * 128, channels=64, per_unit=128, format_name=format_name
    )
    ((_, commit),) = store.commits.items()
    assert commit.bytes > 8 << 20
    monkeypatch.setattr(verify_shard, "HASH_BLOCK", 1 << 16)
    assert shard_faults(store, commit.shard or "", commit) == []  # imports what is needed
    tracemalloc.start()
    try:
        assert shard_faults(store, commit.shard or "", commit) == []
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()
