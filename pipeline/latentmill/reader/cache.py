"""A bounded cache of remote shards on a local disk, shared by the processes of a machine.

Shards are kept in blocks, one file each, named by the hash of the shard's content, so that a
changed shard is another one. A block appears whole or not at all (written aside, then renamed).
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from latentmill.errors import ConfigError, StorageError
from latentmill.reader.pieces import Piece, Shard
from latentmill.storage.storage import Storage

BLOCK = 256 * 1024
_SUFFIX = ".block"
_ABANDONED_SECONDS = 600.0


class RangeCache:
    """Blocks of shards in a folder, the least recently used ones removed first.

    Picklable; any number of processes may share the folder. It may pass its bound by a 64th for
    each process that writes, until the next of them looks.

    Args:
        folder: Where the blocks lie; made if it is missing.
        gib: The most that may lie there, GiB.

    Raises:
        ConfigError: The bound holds less than 64 blocks (16 MiB), or the folder cannot be made.
    """

    def __init__(self, folder: str | Path, gib: float) -> None:
        self.folder, self.gib = Path(folder), gib
        self._bound = int(gib * 2**30)
        self._written = self._bound  # look at the folder before the first block is written
        if self._bound < 64 * BLOCK:
            raise ConfigError(f"cache_gib is {gib}: give the cache at least {64 * BLOCK / 2**30}.")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"No cache can be made at {folder}: {error.strerror}.") from error

    def __reduce__(self) -> tuple[type[RangeCache], tuple[Path, float]]:
        return RangeCache, (self.folder, self.gib)

    def fill(self, storage: Storage, pieces: Sequence[Piece]) -> None:
        """Fill the pieces from the cache, and it from the storage with what is missing."""
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
                    f"{storage.root}/{shard.path} is cut short: restore the shard, or delete it "
                    "and run again."
                )
            blocks[shard, number] = data
            self._save(shard, number, data)
        for piece in pieces:
            for number in _blocks_of(piece):
                block = blocks[piece.shard, number]
                assert block is not None, "it was loaded or read"
                _copy(block, number, piece)

    def _path(self, shard: Shard, number: int) -> Path:
        # Hashed again: what a store says is no name for a file here.
        name = hashlib.sha256(shard.hash.encode()).hexdigest()
        return self.folder / name[:2] / f"{name}-{number}{_SUFFIX}"

    def _load(self, shard: Shard, number: int) -> bytes | None:
        path = self._path(shard, number)
        try:
            data = path.read_bytes()
            os.utime(path)  # used now; access times may be switched off
        except FileNotFoundError:
            return None
        except OSError as error:
            raise self._broken(error) from error
        return data if len(data) == _length(shard, number) else None

    def _save(self, shard: Shard, number: int, data: bytes) -> None:
        if self._written >= self._bound // 64:
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
            raise self._broken(error) from error
        self._written += len(data)

    def _shrink(self) -> None:
        """Remove the least recently used blocks until a 32nd of the bound is free."""
        found = []
        for path in self.folder.glob("*/*"):
            with contextlib.suppress(FileNotFoundError):  # another process removes, too
                stat = path.stat()
                found.append((stat.st_mtime, stat.st_size, path))
        total = sum(size for _, size, _ in found)
        now = time.time()
        for used, size, path in sorted(found):
            abandoned = path.suffix != _SUFFIX and now - used > _ABANDONED_SECONDS
            if abandoned or (path.suffix == _SUFFIX and total > self._bound - self._bound // 32):
                path.unlink(missing_ok=True)
                total -= size
        self._written = 0

    def _broken(self, error: OSError) -> StorageError:
        return StorageError(
            f"The cache in {self.folder} fails ({error.strerror}): free some space there, or set "
            "a smaller cache_gib or another folder."
        )


def _blocks_of(piece: Piece) -> range:
    if not piece.target:
        return range(0)
    last = piece.offset + len(piece.target) - 1
    return range(piece.offset // BLOCK, last // BLOCK + 1)


def _length(shard: Shard, number: int) -> int:
    return min(BLOCK, shard.bytes - number * BLOCK)


def _copy(data: bytes, number: int, piece: Piece) -> None:
    """Copy what a block and a piece share."""
    begin = number * BLOCK
    first = max(piece.offset, begin)
    last = min(piece.offset + len(piece.target), begin + len(data))
    piece.target[first - piece.offset : last - piece.offset] = data[first - begin : last - begin]
