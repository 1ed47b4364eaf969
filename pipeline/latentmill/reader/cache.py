"""A cache of remote shards on a local disk, of limited size, shared by all processes of a machine.

It stores blocks of shards, one file each, under the hash of the shard's content, so a changed shard
never matches old blocks. A block is written to a temporary file and renamed, so it is never partly
visible.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from latentmill.errors import ConfigError, StorageError
from latentmill.storage.storage import Storage

BLOCK = 256 * 1024
_SUFFIX = ".block"
_ABANDONED_SECONDS = 600.0


@dataclass(frozen=True)
class Shard:
    """Path, size and hash of a shard, from its commit."""

    path: str
    bytes: int
    hash: str


@dataclass(frozen=True)
class Piece:
    """A range to read: fills `target` with bytes from `offset` on."""

    shard: Shard
    offset: int
    target: memoryview


class RangeCache:
    """Blocks of shards in a folder; removes the least recently used blocks first.

    Can be pickled; any number of processes may share the folder, which is created if missing. `gib`
    is its maximum size in GiB, at least 64 blocks (16 MiB). Each process that writes may exceed it
    by 1/64 before it checks the size again. Raises ConfigError if the folder cannot be created.
    """

    def __init__(self, folder: str | Path, gib: float) -> None:
        self.folder, self.gib = Path(folder), gib
        self._max_bytes = int(gib * 2**30)
        self._written = self._max_bytes  # check the size before writing the first block
        if self._max_bytes < 64 * BLOCK:
            raise ConfigError(f"cache_gib is {gib}: use at least {64 * BLOCK / 2**30}.")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(
                f"cannot create the cache folder {folder} ({error.strerror}): use another one."
            ) from error

    def __reduce__(self) -> tuple[type[RangeCache], tuple[Path, float]]:
        return RangeCache, (self.folder, self.gib)

    def fill(self, storage: Storage, pieces: Sequence[Piece]) -> None:
        """Fill the pieces from the cache; read missing blocks from the storage into the cache."""
        blocks: dict[tuple[Shard, int], bytes | None] = {}
        for piece in pieces:
            for number in _blocks_of(piece):
                blocks.setdefault((piece.shard, number), None)
        for shard, number in blocks:
            blocks[shard, number] = self._load(shard, number)
        missing = [place for place, data in blocks.items() if data is None]
        found = storage.read_ranges(
            [(shard.path, number * BLOCK, _length(shard, number)) for shard, number in missing]
        )
        for (shard, number), data in zip(missing, found, strict=True):
            if len(data) != _length(shard, number):
                raise StorageError(
                    f"{storage.root}/{shard.path} is truncated: restore the shard, or delete it "
                    "and run the encode command again."
                )
            blocks[shard, number] = data
            self._save(shard, number, data)
        for piece in pieces:
            for number in _blocks_of(piece):
                block = blocks[piece.shard, number]
                assert block is not None, "it was loaded or read"
                _copy(block, number, piece)

    def _path(self, shard: Shard, number: int) -> Path:
        # Hash again: a string from a store must not be used as a file name.
        name = hashlib.sha256(shard.hash.encode()).hexdigest()
        return self.folder / name[:2] / f"{name}-{number}{_SUFFIX}"

    def _load(self, shard: Shard, number: int) -> bytes | None:
        path = self._path(shard, number)
        try:
            data = path.read_bytes()
            os.utime(path)  # record the use; the file system may not update access times
        except FileNotFoundError:
            return None
        except OSError as error:
            raise self._failed(error) from error
        return data if len(data) == _length(shard, number) else None

    def _save(self, shard: Shard, number: int, data: bytes) -> None:
        if self._written >= self._max_bytes // 64:
            self._shrink()
        path = self._path(shard, number)
        try:
            path.parent.mkdir(exist_ok=True)
            with (
                tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file,
                contextlib.ExitStack() as undo,
            ):
                undo.callback(Path(file.name).unlink, missing_ok=True)
                file.write(data)
                file.close()
                Path(file.name).replace(path)
                undo.pop_all()
        except OSError as error:
            raise self._failed(error) from error
        self._written += len(data)

    def _shrink(self) -> None:
        """Remove the least recently used blocks until 1/32 of the maximum size is free."""
        found = []
        for path in self.folder.glob("*/*"):
            with contextlib.suppress(FileNotFoundError):  # another process may remove it
                stat = path.stat()
                found.append((stat.st_mtime, stat.st_size, path))
        total = sum(size for _, size, _ in found)
        now = time.time()
        for used, size, path in sorted(found):
            abandoned = path.suffix != _SUFFIX and now - used > _ABANDONED_SECONDS
            if abandoned or (
                path.suffix == _SUFFIX and total > self._max_bytes - self._max_bytes // 32
            ):
                path.unlink(missing_ok=True)
                total -= size
        self._written = 0

    def _failed(self, error: OSError) -> StorageError:
        return StorageError(
            f"cannot use the cache in {self.folder} ({error.strerror}): free some space there, or "
            "set a smaller cache_gib or another cache folder."
        )


def _blocks_of(piece: Piece) -> range:
    if not piece.target:
        return range(0)
    last = piece.offset + len(piece.target) - 1
    return range(piece.offset // BLOCK, last // BLOCK + 1)


def _length(shard: Shard, number: int) -> int:
    return min(BLOCK, shard.bytes - number * BLOCK)


def _copy(data: bytes, number: int, piece: Piece) -> None:
    """Copy the overlap of a block and a piece."""
    begin = number * BLOCK
    first = max(piece.offset, begin)
    last = min(piece.offset + len(piece.target), begin + len(data))
    piece.target[first - piece.offset : last - piece.offset] = data[first - begin : last - begin]
