"""Reading bytes of shards: positioned reads of local files, batched ranged requests otherwise."""

from __future__ import annotations

import errno
import mmap
import os
import weakref
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from latentmill.errors import StorageError, restore_hint
from latentmill.reader.cache import Piece, RangeCache, Shard
from latentmill.storage.remote import is_web
from latentmill.storage.storage import Storage

OPEN_FILES = 256
THREADS = 8  # parallel requests to a web server


class ShardReader:
    """Fills buffers from shards. Opens files when they are needed, and again after a fork.

    Not thread-safe. The files are closed when the object is deleted.
    """

    def __init__(self, storage: Storage, cache: RangeCache | None = None) -> None:
        self._storage = storage
        self._cache = cache
        self._reset_files()
        self._sizes: dict[str, int] = {}  # sizes of remote shards

    def fill(self, pieces: Sequence[Piece]) -> None:
        """Read all pieces; from a remote store, in one batch of requests.

        Raises StorageError if a shard cannot be read or its size is not the one in its commit.
        """
        if self._pid != os.getpid():  # forked: leave the parent's files open
            self._reset_files()
        if self._storage.local:
            for piece in pieces:
                self._fill_local(piece)
        else:
            self._fill_remote(pieces)

    def view(self, shard: Shard, offset: int, length: int) -> memoryview:
        """Map bytes of a local shard without copying them, for ranges that are read completely.

        Do not use it for crops: the system reads ahead of a mapped page. Raises StorageError as
        `fill` does.
        """
        if self._pid != os.getpid():
            self._reset_files()
        whole = self._maps.get(shard.path)
        if whole is None:
            try:
                file = self._files.get(shard.path) or self._open(shard)
                whole = mmap.mmap(file, 0, access=mmap.ACCESS_COPY)
            except OSError as error:
                raise self._unreadable(shard, error) from error
            self._maps[shard.path] = whole
            if len(self._maps) > OPEN_FILES:  # unmapped when its last view is deleted
                self._maps.popitem(last=False)
        return memoryview(whole)[offset : offset + length]

    def _reset_files(self) -> None:
        self._pid = os.getpid()
        self._maps: OrderedDict[str, mmap.mmap] = OrderedDict()
        self._files: OrderedDict[str, int] = OrderedDict()
        weakref.finalize(self, _close, self._files, self._pid)

    def _fill_local(self, piece: Piece) -> None:
        shard, offset, target = piece
        try:
            file = self._files.get(shard.path)
            if file is None:
                file = self._open(shard)
            else:
                self._files.move_to_end(shard.path)
            # A call reads at most 2 GiB, and less after a signal.
            while (count := os.preadv(file, [target], offset)) < len(target):
                if count == 0:
                    raise self._changed(shard)
                target, offset = target[count:], offset + count
        except OSError as error:
            raise self._unreadable(shard, error) from error

    def _open(self, shard: Shard) -> int:
        file = os.open(Path(self._storage.full(shard.path)), os.O_RDONLY | os.O_CLOEXEC)
        if os.fstat(file).st_size != shard.bytes:
            os.close(file)
            raise self._changed(shard)
        self._files[shard.path] = file
        if len(self._files) > OPEN_FILES:
            os.close(self._files.popitem(last=False)[1])
        return file

    def _fill_remote(self, pieces: Sequence[Piece]) -> None:
        shards = {piece.shard for piece in pieces}
        self._find_sizes({shard.path for shard in shards} - self._sizes.keys())
        for shard in shards:
            if shard.path not in self._sizes:
                missing = FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
                raise self._unreadable(shard, missing) from missing
            if self._sizes[shard.path] != shard.bytes:
                raise self._changed(shard)
        if self._cache is not None:
            self._cache.fill(self._storage, pieces)
            return
        found = self._storage.read_ranges(
            [(piece.shard.path, piece.offset, len(piece.target)) for piece in pieces]
        )
        for piece, data in zip(pieces, found, strict=True):
            if len(data) != len(piece.target):
                raise self._changed(piece.shard)
            piece.target[:] = data

    def _find_sizes(self, paths: set[str]) -> None:
        """Get the sizes of shards, with one listing per folder if the storage can list."""
        if not paths:
            return
        if is_web(self._storage.root):  # web servers cannot list
            with ThreadPoolExecutor(THREADS) as pool:
                self._sizes.update(zip(paths, pool.map(self._size, paths), strict=True))
            return
        for folder in {path.rpartition("/")[0] for path in paths}:
            listed = self._storage.list(folder)
            self._sizes.update({f"{folder}/{name}": size for name, size in listed.items()})

    def _size(self, path: str) -> int:
        with self._storage.open(path) as file:
            return file.seek(0, os.SEEK_END)

    def _unreadable(self, shard: Shard, error: OSError) -> StorageError:
        return StorageError(
            f"cannot read {self._storage.named(shard.path)} ({error.strerror or error}): check "
            "that the store is complete and readable."
        )

    def _changed(self, shard: Shard) -> StorageError:
        return StorageError(
            f"{self._storage.named(shard.path)} does not have the size recorded in its commit: "
            f"{restore_hint('the shard')}."
        )


def _close(files: OrderedDict[str, int], pid: int) -> None:
    if pid == os.getpid():
        while files:
            os.close(files.popitem()[1])
