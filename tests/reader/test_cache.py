"""The local cache of remote stores: what it saves, its bound, and what may go wrong with it."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import numpy as np
import pytest
from torch.utils.data import DataLoader

import latentmill as lm
from latentmill.errors import ConfigError, StorageError
from latentmill.reader import cache as cache_module
from latentmill.reader.cache import Piece, RangeCache, Shard
from latentmill.reader.crops import CropReader
from latentmill.storage.storage import Storage
from latentmill.store.store import LatentStore
from support.latent_store import write_latents

BLOCK = 4096


@pytest.fixture
def remote(lengths: list[int], monkeypatch: pytest.MonkeyPatch, request) -> LatentStore:
    monkeypatch.setattr(cache_module, "BLOCK", BLOCK)
    return write_latents(f"memory://{request.node.name}", lengths)


@pytest.fixture
def requests(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many ranges every batch of requests had."""
    made: list[int] = []
    real = Storage.read_ranges
    monkeypatch.setattr(
        Storage,
        "read_ranges",
        lambda self, ranges: (made.append(len(ranges)) if ranges else None) or real(self, ranges),
    )
    return made


def read_all(store: LatentStore, cache: RangeCache | None) -> np.ndarray:
    reader = CropReader(store, cache)
    block, _ = reader.read_block(np.arange(len(store)), np.zeros(len(store), np.int64), 300)
    return block


def blocks(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def test_what_was_read_is_not_asked_for_again(
    remote: LatentStore, tmp_path: Path, requests: list[int]
) -> None:
    expected = read_all(remote, None)
    cache = RangeCache(tmp_path, 1)
    requests.clear()
    assert np.array_equal(read_all(remote, cache), expected)
    assert len(requests) == 1
    assert np.array_equal(read_all(remote, pickle.loads(pickle.dumps(cache))), expected)
    assert len(requests) == 1
    size = sum(path.stat().st_size for path in blocks(tmp_path))
    assert size <= sum(size for size, _ in remote.shard_sizes().values())


def test_the_bound_holds(remote: LatentStore, tmp_path: Path) -> None:
    gib = 64 * BLOCK / 2**30
    cache = RangeCache(tmp_path, gib)
    old = tmp_path / "ab" / "abandoned"
    old.parent.mkdir()
    old.write_bytes(b"left by a killed process")
    os.utime(old, (0, 0))
    expected = read_all(remote, None)
    reader = CropReader(remote, cache)
    for row in range(len(remote)):
        block, _ = reader.read_block(np.array([row]), np.array([0]), 300)
        assert np.array_equal(block[0], expected[row])
        assert sum(path.stat().st_size for path in blocks(tmp_path)) <= 66 * BLOCK
    assert not old.exists()


def test_the_least_recently_used_block_goes_first(tmp_path: Path, remote: LatentStore) -> None:
    for number in range(80):
        path = tmp_path / "00" / f"old-{number}.block"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(bytes(BLOCK))
        os.utime(path, (1000 + (number * 7) % 80, 1000 + (number * 7) % 80))
    cache = RangeCache(tmp_path, 64 * BLOCK / 2**30)
    read_all(remote, cache)
    left = {int(path.stem[4:]) for path in (tmp_path / "00").glob("old-*")}
    ages = [(number * 7) % 80 for number in left]
    assert ages
    assert min(ages) == 80 - len(ages)


def test_a_damaged_block_is_read_again(
    remote: LatentStore, tmp_path: Path, requests: list[int]
) -> None:
    expected = read_all(remote, None)
    read_all(remote, cache := RangeCache(tmp_path, 1))
    blocks(tmp_path)[0].write_bytes(b"cut")
    requests.clear()
    assert np.array_equal(read_all(remote, cache), expected)
    assert requests == [1]


def test_what_a_store_says_is_no_path(remote: LatentStore, tmp_path: Path) -> None:
    path, (size, _) = next(iter(remote.shard_sizes().items()))
    piece = Piece(Shard(path, size, "../../evil"), 0, memoryview(bytearray(size)))
    RangeCache(tmp_path / "deep" / "cache", 1).fill(remote.storage, [piece])
    assert piece.target == remote.storage.read(path)
    assert blocks(tmp_path / "deep" / "cache") == blocks(tmp_path) != []


def test_a_disk_that_fails_is_one_sentence(
    remote: LatentStore, tmp_path: Path, one_sentence, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot create the cache folder") as error:
        RangeCache(tmp_path / "file" / "cache", 1)
    one_sentence(error.value)
    with pytest.raises(ConfigError, match="cache_gib") as small:
        RangeCache(tmp_path, 0)
    assert str(small.value).endswith(".")

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    cache = RangeCache(tmp_path, 1)
    monkeypatch.setattr(cache_module.tempfile, "NamedTemporaryFile", full)
    with pytest.raises(StorageError, match="No space left") as failed:
        read_all(remote, cache)
    one_sentence(failed.value)


def test_a_bucket_is_read_by_workers_through_the_cache(
    s3_bucket: str, lengths: list[int], tmp_path: Path
) -> None:
    url = f"{s3_bucket}/latents"
    write_latents(url, lengths)
    local = lm.LatentDataset(write_latents(str(tmp_path / "local"), lengths), crop=32)
    remote = lm.LatentDataset(url, crop=32, cache=tmp_path / "cache", cache_gib=1)
    local.set_epoch(0)
    remote.set_epoch(0)
    remote[0]  # the parent has connections
    loader = DataLoader(remote, batch_size=8, num_workers=2, collate_fn=lm.collate)
    found = [row for batch in loader for row in batch["latents"].numpy()]
    assert all(np.array_equal(row, local[n].latents) for n, row in enumerate(found))
    assert len(found) == 40
    assert blocks(tmp_path / "cache")
