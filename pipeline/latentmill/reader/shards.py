"""Reading bytes of shards: positioned reads of local files, batched ranged requests otherwise."""

from __future__ import annotations

import errno
import itertools
import os
import weakref
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from mmap import mmap

from latentmill.errors import DamagedShardError, StorageError, restore_hint
from latentmill.reader.cache import Piece, RangeCache, Shard
from latentmill.reader.open_files import OpenFile, OpenFiles, files_of_process
from latentmill.storage.remote import NO_MORE_FILES, is_web, too_many_files
from latentmill.storage.storage import Storage

THREADS = 8  # parallel requests to a web server
_numbers = itertools.count()  # of readers


class ShardReader:
    """Fills buffers from shards. Opens files when they are needed, and again after a fork.

    Not thread-safe. All readers of a process share a number of open files, so any of them may
    close another one's. The files are closed when the object is deleted.
    """

    def __init__(self, storage: Storage, cache: RangeCache | None = None) -> None:
        self._storage = storage
        self._cache = cache
        self._number = next(_numbers)
        weakref.finalize(self, _close, self._number).atexit = False
        self._sizes: dict[str, int] = {}  # sizes of remote shards

    def fill(self, pieces: Sequence[Piece]) -> None:
        """Read all pieces; from a remote store, in one batch of requests.

        Raises StorageError if a shard cannot be read or its size is not the one in its commit.
        """
        if self._storage.local:
            files = files_of_process()
            for piece in pieces:
                self._fill_local(piece, files)
        else:
            self._fill_remote(pieces)

    def view(self, shard: Shard, offset: int, length: int) -> memoryview:
        """Map bytes of a local shard without copying them, for ranges that are read completely.

        Do not use it for crops: the system reads ahead of a mapped page. Raises StorageError as
        `fill` does.
        """
        try:  # unmapped when its last view is deleted
            files, path = files_of_process(), shard.path
            whole = files.get(self._number, path, mmap, lambda: self._open(shard).mapped())
        except OSError as error:
            raise self._unreadable(shard, error) from error
        return memoryview(whole)[offset : offset + length]

    def _fill_local(self, piece: Piece, files: OpenFiles) -> None:
        shard, offset, target = piece
        try:
            file = files.get(self._number, shard.path, OpenFile, lambda: self._open(shard))
            # A call reads at most 2 GiB, and less after a signal.
            while (count := os.preadv(file.number, [target], offset)) < len(target):
                if count == 0:
                    raise self._changed(shard)
                target, offset = target[count:], offset + count
        except OSError as error:
            raise self._unreadable(shard, error) from error

    def _open(self, shard: Shard) -> OpenFile:
        file = OpenFile(self._storage.full(shard.path))
        if file.size != shard.bytes:
            raise self._changed(shard)
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
        on_web = {path for path in paths if is_web(self._storage.named(path))}
        if on_web:  # web servers cannot list
            with ThreadPoolExecutor(THREADS) as pool:
                self._sizes.update(zip(on_web, pool.map(self._size, on_web), strict=True))
        for folder in {path.rpartition("/")[0] for path in paths - on_web}:
            listed = self._storage.list(folder)
            self._sizes.update({f"{folder}/{name}": size for name, size in listed.items()})

    def _size(self, path: str) -> int:
        with self._storage.open(path) as file:
            return file.seek(0, os.SEEK_END)

    def _unreadable(self, shard: Shard, error: OSError) -> StorageError:
        if error.errno in NO_MORE_FILES:
            return too_many_files(os.strerror(error.errno))
        return StorageError(
            f"cannot read {self._storage.named(shard.path)} ({error.strerror or error}): check "
            "that the store is complete and readable."
        )

    def _changed(self, shard: Shard) -> DamagedShardError:
        return DamagedShardError(
            f"{self._storage.named(shard.path)} does not have the size recorded in its commit: "
            f"{restore_hint('the shard')}."
        )


def _close(reader: int) -> None:
    files_of_process().close(reader)
