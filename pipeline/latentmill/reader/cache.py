"""A cache of remote shards on a local disk, of limited size, shared by all processes of a machine.

It stores blocks of shards, one file each, under the hash of the shard's content, so a changed shard
never matches old blocks. A block is written to a temporary file and renamed, so it is never partly
visible. Files with other names than those that the cache makes are never removed nor counted.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import math
import os
import re
import stat
import tempfile
import time
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from latentmill.errors import ConfigError, DamagedShardError, StorageError, restore_hint
from latentmill.storage.remote import NO_MORE_FILES, too_many_files
from latentmill.storage.storage import Storage

BLOCK = 256 * 1024
SPAN = 64  # blocks (16 MiB); a request reads at most those of one span
BLOCKS_TOGETHER = 256  # that are read at once and in memory at the same time
_SUFFIX = ".block"
_FOLDER = re.compile(r"[0-9a-f]{2}")
_FILE = re.compile(r"[0-9a-f]{64}-[0-9]+(\.block|\.lock|-[a-z0-9_]{8}\.tmp)")
_ABANDONED_SECONDS = 600.0


@dataclass(frozen=True)
class Shard:
    """Path, size and hash of a shard, from its commit."""

    path: str
    bytes: int
    hash: str


class Piece(NamedTuple):
    """A range to read: fills `target` with bytes from `offset` on."""

    shard: Shard
    offset: int
    target: memoryview


_Span = tuple[Shard, int]


class _BlockRange(NamedTuple):
    """Consecutive blocks of a shard: `first` to before `end`."""

    shard: Shard
    first: int
    end: int

    @property
    def length(self) -> int:
        """Their bytes."""
        return _length(*self)


class RangeCache:
    """Blocks of shards in a folder; removes the least recently used blocks first.

    Can be pickled; any number of processes may share the folder, which is created if missing. `gib`
    is its maximum size in GiB, at least 64 blocks (16 MiB). Each process that writes may exceed it
    by 1/64 before it checks the size again, and by as much again while another one checks it.
    Raises ConfigError if the folder is an empty string or cannot be created.

    With `whole`, everything is expected to be read sooner or later and to fit, so a missing block
    is read together with its neighbours: fewer, larger requests fill a new cache faster.
    """

    def __init__(self, folder: str | Path, gib: float, *, whole: bool = False) -> None:
        if not isinstance(gib, int | float | np.number) or not math.isfinite(gib):
            raise ConfigError(f"cache_gib must be a number of GiB, not {gib!r}.")
        self.folder, self.gib, self.whole = Path(folder), gib, whole
        self._max_bytes = int(gib * 2**30)
        self._written = self._max_bytes  # check the size before writing the first block
        if not os.fspath(folder):
            raise ConfigError(
                "cache is an empty string: give the path of a folder, or None for no cache."
            )
        if self._max_bytes < 64 * BLOCK:
            raise ConfigError(f"cache_gib is {gib}: use at least {64 * BLOCK / 2**30}.")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(
                f"cannot create the cache folder {folder} ({error.strerror}): use another one."
            ) from error

    def __deepcopy__(self, memo: dict[int, object]) -> RangeCache:
        return self  # also used by several threads

    def __reduce__(self) -> tuple[Callable[..., RangeCache], tuple[Path, float]]:
        return partial(RangeCache, whole=self.whole), (self.folder, self.gib)

    def holds(self, size: int) -> bool:
        """Whether that many bytes fit into the cache without removing any."""
        return size <= self._held_bytes

    @property
    def _held_bytes(self) -> int:
        """The size to which the cache shrinks when it is full."""
        return self._max_bytes - self._max_bytes // 32

    def fill(self, storage: Storage, pieces: Sequence[Piece]) -> None:
        """Fill the pieces from the cache; read missing blocks from the storage into the cache.

        Neighbouring blocks are read by one request, and each by one process or thread: the others
        wait for it.
        """
        wanted: dict[_Span, list[tuple[Piece, int]]] = {}
        for piece in pieces:
            for number in _blocks_of(piece):
                if not self._copy_cached(number, piece):
                    span = (piece.shard, number // SPAN)
                    wanted.setdefault(span, []).append((piece, number))
        while wanted:
            with contextlib.ExitStack() as locks:
                held, blocks = list[_Span](), 0
                for span, places in wanted.items():
                    blocks += self._blocks_to_read(span[0], len(places))
                    if held and blocks > BLOCKS_TOGETHER:
                        break
                    if locks.enter_context(self._locked(span, wait=False)):
                        held.append(span)
                if not held:
                    held = [next(iter(wanted))]
                    locks.enter_context(self._locked(held[0], wait=True))
                self._read(storage, {span: wanted.pop(span) for span in held})

    def _blocks_to_read(self, shard: Shard, wanted: int) -> int:
        """The most blocks of a span that are read if some are wanted."""
        return min(SPAN, -(-shard.bytes // BLOCK)) if self.whole else wanted

    def _read(self, storage: Storage, wanted: dict[_Span, list[tuple[Piece, int]]]) -> None:
        """Read the blocks that are still missing, and fill the pieces that need them."""
        needed: dict[tuple[Shard, int], list[Piece]] = {}
        for places in wanted.values():
            for piece, number in places:
                if not self._copy_cached(number, piece):
                    needed.setdefault((piece.shard, number), []).append(piece)
        ranges = self._ranges(set(needed))
        found = storage.read_ranges(
            [(one.shard.path, one.first * BLOCK, one.length) for one in ranges]
        )
        for one, data in zip(ranges, found, strict=True):
            shard, first, end = one
            if len(data) != one.length:
                raise DamagedShardError(
                    f"{storage.root}/{shard.path} is truncated: {restore_hint('the shard')}."
                )
            for number in range(first, end):
                block = memoryview(data)[(number - first) * BLOCK : (number + 1 - first) * BLOCK]
                self._save(shard, number, block)
                for piece in needed.get((shard, number), []):
                    target, offset = _overlap(number, piece)
                    target[:] = block[offset : offset + len(target)]

    def _ranges(self, missing: set[tuple[Shard, int]]) -> list[_BlockRange]:
        """The blocks to read: the missing ones and, if all shards fit, those around them."""
        for shard, number in list(missing) if self.whole else []:
            first = number // SPAN * SPAN
            for other in range(first, min(first + SPAN, -(-shard.bytes // BLOCK))):
                if (shard, other) not in missing and not self._path(shard, other).exists():
                    missing.add((shard, other))
        ranges: list[_BlockRange] = []
        for shard, number in sorted(missing, key=lambda place: (place[0].path, place[1])):
            last = ranges[-1] if ranges else None
            if last and last.shard == shard and last.end == number and number % SPAN:
                ranges[-1] = last._replace(end=number + 1)
            else:
                ranges.append(_BlockRange(shard, number, number + 1))
        return ranges

    @contextlib.contextmanager
    def _locked(self, span: _Span, *, wait: bool) -> Iterator[bool]:
        """Hold the lock on reading a span; yields whether it is held, which it is after a wait."""
        shard, number = span
        path = self._path(shard, number * SPAN).with_suffix(".lock")
        with self._locked_file(path, wait=wait) as held:
            yield held

    @contextlib.contextmanager
    def _locked_file(self, path: Path, *, wait: bool) -> Iterator[bool]:
        try:
            path.parent.mkdir(exist_ok=True)
            file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC)
        except OSError as error:
            raise self._failed(error) from error
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            held = True
        except BlockingIOError:
            held = False
        except OSError:  # a file system without locks: two processes may read the same blocks
            held = True
        try:
            yield held
        finally:
            os.close(file)  # ends the lock

    def _path(self, shard: Shard, number: int) -> Path:
        # Hash again: a string from a store must not be used as a file name.
        name = hashlib.sha256(shard.hash.encode()).hexdigest()
        return self.folder / name[:2] / f"{name}-{number}{_SUFFIX}"

    def _copy_cached(self, number: int, piece: Piece) -> bool:
        """Copy the overlap of a block and a piece from the cache; False if it is not cached."""
        path = self._path(piece.shard, number)
        target, offset = _overlap(number, piece)
        try:
            file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return False
        except OSError as error:
            raise self._failed(error) from error
        try:
            os.utime(file)  # record the use; the file system may not update access times
            if os.fstat(file).st_size != _length(piece.shard, number, number + 1):
                return False
            return os.preadv(file, [target], offset) == len(target)
        except OSError as error:
            raise self._failed(error) from error
        finally:
            os.close(file)

    def _save(self, shard: Shard, number: int, data: memoryview) -> None:
        if self._written >= self._max_bytes // 64:
            self._shrink()
        path = self._path(shard, number)
        try:
            path.parent.mkdir(exist_ok=True)
            with (
                tempfile.NamedTemporaryFile(
                    dir=path.parent, prefix=f"{path.stem}-", suffix=".tmp", delete=False
                ) as file,
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
        """Remove the least recently used blocks until 1/32 of the maximum size is free.

        While another process does it, this one goes on: listing a large cache takes long.
        """
        with self._locked_file(self.folder / "shrink.lock", wait=False) as held:
            if held:
                try:
                    self._remove_oldest()
                except OSError as error:
                    raise self._failed(error) from error
        self._written = 0

    def _remove_oldest(self) -> None:
        """Remove abandoned files and, if the cache is full, the least recently used blocks."""
        total, used, sizes = 0, array("q"), array("q")  # few bytes for each of millions of blocks
        now = time.time_ns()
        for path, status in self._own_files():
            if path.endswith(_SUFFIX):
                used.append(status.st_mtime_ns)
                sizes.append(status.st_size)
            elif now - status.st_mtime_ns > _ABANDONED_SECONDS * 1e9:
                _remove(path)
                continue
            total += status.st_size
        if self.holds(total) or not used:
            return
        order = np.argsort(used, kind="stable")
        freed = np.cumsum(np.asarray(sizes)[order])
        count = min(int(np.searchsorted(freed, total - self._held_bytes)) + 1, len(used))
        newest = used[order[count - 1]]
        as_new = count - int((np.asarray(used) < newest).sum())  # of those used at that time
        for path, status in self._own_files():
            if path.endswith(_SUFFIX) and status.st_mtime_ns <= newest:
                if status.st_mtime_ns == newest:
                    as_new -= 1
                if as_new >= 0 or status.st_mtime_ns < newest:
                    _remove(path)

    def _own_files(self) -> Iterator[tuple[str, os.stat_result]]:
        """Path and status of each file that a cache made in the folder."""
        with os.scandir(self.folder) as found:
            folders = [one for one in found if _FOLDER.fullmatch(one.name)]
        for folder in folders:
            if not folder.is_dir(follow_symlinks=False):
                continue
            with os.scandir(folder.path) as found:
                files = [one for one in found if _FILE.fullmatch(one.name)]
            for file in files:
                if file.name[:2] != folder.name:
                    continue
                with contextlib.suppress(FileNotFoundError):  # another process may remove it
                    status = file.stat(follow_symlinks=False)
                    if stat.S_ISREG(status.st_mode):
                        yield file.path, status

    def _failed(self, error: OSError) -> StorageError:
        if error.errno in NO_MORE_FILES:
            return too_many_files(os.strerror(error.errno))
        return StorageError(
            f"cannot use the cache in {self.folder} ({error.strerror}): free some space there, or "
            "set a smaller cache_gib or another cache folder."
        )


def _remove(path: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)  # noqa: PTH108  a Path takes longer to make than a file to remove


def _blocks_of(piece: Piece) -> range:
    if not piece.target:
        return range(0)
    last = piece.offset + len(piece.target) - 1
    return range(piece.offset // BLOCK, last // BLOCK + 1)


def _length(shard: Shard, first: int, last: int) -> int:
    """Bytes in the blocks from `first` to before `last`."""
    return min(last * BLOCK, shard.bytes) - first * BLOCK


def _overlap(number: int, piece: Piece) -> tuple[memoryview, int]:
    """The part of a piece's target that is in a block, and its offset in the block."""
    begin = number * BLOCK
    first = max(piece.offset, begin)
    last = min(piece.offset + len(piece.target), begin + BLOCK)
    return piece.target[first - piece.offset : last - piece.offset], first - begin
