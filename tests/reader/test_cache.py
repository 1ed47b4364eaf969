"""The local cache of remote stores: what it saves, its bound, and what may go wrong with it."""

from __future__ import annotations

import fcntl
import os
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

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


def name(start: str) -> str:
    """The name of a shard in a cache."""
    return f"{start:0<64}"


def blocks(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock"]


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


@pytest.mark.parametrize("together", [1, 256])
def test_neighbouring_blocks_are_one_request(
    remote: LatentStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, together: int
) -> None:
    """With `whole`, all blocks of a span are; without, those that are needed."""
    monkeypatch.setattr(cache_module, "BLOCKS_TOGETHER", together)
    monkeypatch.setattr(cache_module, "SPAN", 4)
    block = BLOCK // 2
    monkeypatch.setattr(cache_module, "BLOCK", block)
    path, (size, digest) = max(remote.shard_sizes().items(), key=lambda one: one[1][0])
    data, shard = remote.storage.read(path), Shard(path, size, digest)
    assert 8 * block < size <= 12 * block
    made: list[list[tuple[int, int]]] = []
    real = Storage.read_ranges

    def counted(self: Storage, ranges: Any) -> Any:
        made.append([(offset // block, -(-length // block)) for _, offset, length in ranges])
        return real(self, ranges)

    monkeypatch.setattr(Storage, "read_ranges", counted)

    def read(cache: RangeCache, *places: tuple[int, int]) -> list[tuple[int, int]]:
        made.clear()
        pieces = [Piece(shard, at, memoryview(bytearray(count))) for at, count in places]
        cache.fill(remote.storage, pieces)
        assert [bytes(p.target) for p in pieces] == [data[at : at + n] for at, n in places]
        return [run for runs in made for run in runs]

    cache = RangeCache(tmp_path / "parts", 1)
    assert read(cache, (block - 9, 10), (7, 5), (4 * block, 3)) == [(0, 2), (4, 1)]
    assert read(cache, (0, 4 * block)) == [(2, 2)]
    assert read(cache, (0, 5 * block)) == []
    cache = RangeCache(tmp_path / "whole", 1, whole=True)
    assert read(cache, (2 * block, 9)) == [(0, 4)]
    assert read(pickle.loads(pickle.dumps(cache)), (4 * block, 9))[0][0] == 4
    assert read(cache, (0, size)) == [(8, -(-size // block) - 8)]


def test_blocks_are_read_once_by_all_threads_and_processes(
    remote: LatentStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, (size, digest) = max(remote.shard_sizes().items(), key=lambda one: one[1][0])
    data, shard = remote.storage.read(path), Shard(path, size, digest)
    made: list[int] = []
    reading, others = threading.Event(), threading.Event()
    real = Storage.read_ranges

    def slow(self: Storage, ranges: Any) -> Any:
        if ranges:
            made.append(len(ranges))
            reading.set()
            assert others.wait(120)
        return real(self, ranges)

    monkeypatch.setattr(Storage, "read_ranges", slow)

    def read(number: int) -> bytes:
        if number:
            assert reading.wait(120)
        piece = Piece(shard, number, memoryview(bytearray(size - number)))
        if number == 3:
            others.set()
        RangeCache(tmp_path, 1, whole=True).fill(remote.storage, [piece])
        return bytes(piece.target)

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(read, range(4))) == [data[number:] for number in range(4)]
    assert len(made) == 1


@pytest.mark.parametrize(("gib", "where", "whole"), [(1, None, True), (1, "number > 3", False)])
def test_all_is_read_if_it_is_needed_and_fits(
    remote: LatentStore, tmp_path: Path, gib: float, where: str | None, whole: bool
) -> None:
    dataset = lm.LatentDataset(remote, crop=8, where=where, cache=tmp_path, cache_gib=gib)
    cache = dataset.corpus.stores[0].crops._shards._cache
    assert cache is not None
    assert cache.whole == whole
    assert cache.holds(2**29)
    assert not cache.holds(2**30)


def test_the_bound_holds(remote: LatentStore, tmp_path: Path) -> None:
    gib = 64 * BLOCK / 2**30
    cache = RangeCache(tmp_path, gib)
    left = [tmp_path / "ab" / f"{name('ab')}-{end}" for end in ("3.lock", "17-a_b1c2d3.tmp")]
    for old in left:
        old.parent.mkdir(exist_ok=True)
        old.write_bytes(b"left by a killed process")
        os.utime(old, (0, 0))
    expected = read_all(remote, None)
    reader = CropReader(remote, cache)
    for row in range(len(remote)):
        block, _ = reader.read_block(np.array([row]), np.array([0]), 300)
        assert np.array_equal(block[0], expected[row])
        assert sum(path.stat().st_size for path in blocks(tmp_path)) <= 66 * BLOCK
    assert not any(old.exists() for old in left)


def test_other_files_in_the_folder_are_neither_removed_nor_counted(
    remote: LatentStore, tmp_path: Path, requests: list[int]
) -> None:
    own = name("ab")
    names = [
        "store/dataset.json",
        "store/0-0.block",
        "ab/notes.txt",
        "ab/tmpa1b2c3d4",
        f"ab/{own}-0.blocks",
        f"ab/{own[:-1]}-0.block",
        f"ab/{own}-a.lock",
        f"ab/{name('cd')}-0.block",
        f"store/{own}-0.block",
        f"ab/{own}-0.block/figure.png",
        f"{own}-0.block",
        "ef",
    ]
    for one in names:
        path = tmp_path / one
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bytes(8 * BLOCK))
        os.utime(path, (0, 0))
        os.utime(path.parent, (0, 0))
    elsewhere = tmp_path / "store" / "elsewhere"
    elsewhere.write_bytes(bytes(8 * BLOCK))
    linked = tmp_path / "ab" / f"{own}-1.block"
    linked.symlink_to(elsewhere)
    os.utime(linked, (0, 0), follow_symlinks=False)
    (tmp_path / "cd").symlink_to(tmp_path / "store")
    (tmp_path / "store" / f"{name('cd')}-0.lock").touch()
    os.utime(tmp_path / "store" / f"{name('cd')}-0.lock", (0, 0))
    cache = RangeCache(tmp_path, 64 * BLOCK / 2**30)
    expected = read_all(remote, None)
    assert np.array_equal(read_all(remote, cache), expected)
    requests.clear()
    assert np.array_equal(read_all(remote, cache), expected)
    assert requests == []  # the other files have not taken its blocks' bytes
    assert all((tmp_path / one).is_file() for one in [*names, "store/elsewhere"])
    assert linked.is_symlink()
    assert (tmp_path / "store" / f"{name('cd')}-0.lock").exists()


def test_the_least_recently_used_block_goes_first(tmp_path: Path, remote: LatentStore) -> None:
    for number in range(80):
        path = tmp_path / "00" / f"{name('00')}-{number}.block"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(bytes(BLOCK))
        os.utime(path, (1000 + (number * 7) % 80, 1000 + (number * 7) % 80))
    cache = RangeCache(tmp_path, 64 * BLOCK / 2**30)
    read_all(remote, cache)
    left = {int(path.stem[65:]) for path in (tmp_path / "00").iterdir()}
    ages = [(number * 7) % 80 for number in left]
    assert ages
    assert min(ages) == 80 - len(ages)


def test_of_blocks_of_one_time_no_more_are_removed_than_needed(
    tmp_path: Path, remote: LatentStore
) -> None:
    """After the cache was copied, for example."""
    for number in range(80):
        path = tmp_path / "00" / f"{name('00')}-{number}.block"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(bytes(BLOCK))
        os.utime(path, (1000, 1000))
    cache = RangeCache(tmp_path, 64 * BLOCK / 2**30)
    piece = Piece(Shard("shard", BLOCK, "hash"), 0, memoryview(bytearray(BLOCK)))
    remote.storage.write("shard", bytes(BLOCK))
    cache.fill(remote.storage, [piece])
    assert len(list((tmp_path / "00").iterdir())) == 62  # 1/32 of 64 is free


def test_one_process_at_a_time_lists_the_cache(tmp_path: Path, remote: LatentStore) -> None:
    old = tmp_path / "ab" / f"{name('ab')}-0.lock"
    old.parent.mkdir()
    old.touch()
    os.utime(old, (0, 0))
    expected = read_all(remote, None)
    with (tmp_path / "shrink.lock").open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        assert np.array_equal(read_all(remote, RangeCache(tmp_path, 1)), expected)
        assert old.exists()
    for block in blocks(tmp_path):
        block.unlink()
    assert np.array_equal(read_all(remote, RangeCache(tmp_path, 1)), expected)
    assert not old.exists()


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
    with pytest.raises(ConfigError, match="cache is an empty string") as empty:
        lm.LatentDataset(remote, crop=8, cache="")
    one_sentence(empty.value)

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    cache = RangeCache(tmp_path, 1)
    monkeypatch.setattr(cache_module.tempfile, "NamedTemporaryFile", full)
    with pytest.raises(StorageError, match="No space left") as failed:
        read_all(remote, cache)
    one_sentence(failed.value)

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    old = tmp_path / "ab" / f"{name('ab')}-0.lock"
    old.parent.mkdir()
    old.touch()
    os.utime(old, (0, 0))
    monkeypatch.setattr(os, "unlink", refuse)
    with pytest.raises(StorageError, match="Permission denied") as refused:
        read_all(remote, RangeCache(tmp_path, 1))
    one_sentence(refused.value)


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
