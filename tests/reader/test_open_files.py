"""Readers of several local stores share the files that a process may open."""

from __future__ import annotations

import os
import resource
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from latentmill.errors import StorageError
from latentmill.reader.cache import Piece, Shard
from latentmill.reader.open_files import OpenFiles
from latentmill.reader.shards import ShardReader
from latentmill.storage.storage import Storage
from support.open_files import open_files

STORES, SHARDS, BYTES = 4, 60, 16
FREE = 40  # files that the process may open


@pytest.fixture
def few_files() -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    highest = max(map(int, os.listdir("/proc/self/fd")))  # noqa: PTH208
    resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 1 + FREE, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


@pytest.fixture
def readers(tmp_path: Path) -> list[ShardReader]:
    """Of stores whose shards are all different."""
    for store in range(STORES):
        (tmp_path / f"{store}").mkdir()
        for shard in range(SHARDS):
            (tmp_path / f"{store}" / f"{shard}.bin").write_bytes(content(store, shard))
    return [ShardReader(Storage(str(tmp_path / f"{store}"))) for store in range(STORES)]


def content(store: int, shard: int) -> bytes:
    return bytes([store] * (BYTES // 2) + [shard] * (BYTES // 2))


def shard_of(number: int) -> Shard:
    return Shard(f"{number}.bin", BYTES, "hash")


def crop(reader: ShardReader, number: int) -> bytes:
    target = bytearray(BYTES)
    reader.fill([Piece(shard_of(number), 0, memoryview(target))])
    return bytes(target)


def whole(reader: ShardReader, number: int) -> bytes:
    return bytes(reader.view(shard_of(number), 0, BYTES))


@pytest.mark.parametrize("read", [crop, whole])
@pytest.mark.usefixtures("few_files")
def test_stores_share_the_open_files(
    readers: list[ShardReader], read: Callable[[ShardReader, int], bytes], tmp_path: Path
) -> None:
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    for _ in range(2):
        for number in range(SHARDS):
            for store, reader in enumerate(readers):
                assert read(reader, number) == content(store, number)
        assert 0 < len(open_files(tmp_path)) <= limit // 4
    del reader
    readers.clear()
    assert not open_files(tmp_path)


@pytest.mark.usefixtures("few_files")
def test_files_are_closed_if_no_more_can_be_opened(
    readers: list[ShardReader], one_sentence: Callable[[BaseException], str]
) -> None:
    first, second, *_ = readers
    assert [crop(first, number) for number in (0, 1)] == [content(0, 0), content(0, 1)]
    held = []
    try:
        with pytest.raises(OSError, match="Too many open files"):
            while True:
                held.append(os.open("/dev/null", os.O_RDONLY))
        assert crop(second, 0) == content(1, 0)  # instead of the first one's files
        assert whole(first, 0) == content(0, 0)
        held.append(os.open("/dev/null", os.O_RDONLY))
        with pytest.raises(StorageError, match="Cannot open more files") as error:
            whole(second, 0)
        assert "ulimit -n" in one_sentence(error.value)
    finally:
        for one in held:
            os.close(one)


def test_threads_that_close_the_files_of_each_other(
    readers: list[ShardReader], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(OpenFiles, "limit", staticmethod(lambda: 1))

    def read_all(store: int) -> None:
        for number in [*range(SHARDS)] * 5:
            assert crop(readers[store], number) == content(store, number)
            assert whole(readers[store], number) == content(store, number)

    with ThreadPoolExecutor(STORES) as pool:
        list(pool.map(read_all, range(STORES)))
