"""Reading byte ranges: seekable remote files, and many ranges in one round of requests."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import fsspec

from latentmill.storage import objects
from latentmill.storage.remote import is_transient, retrying


class RangedFile(io.RawIOBase):
    """A file that is read by ranges through `read(offset, length)`.

    `read` may retry or cache, and may return fewer bytes. `size` is the file's length in bytes.
    """

    def __init__(self, size: int, read: Callable[[int, int], bytes]) -> None:
        self._size, self._read_range = size, read
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        self._at = max(0, base + offset)
        return self._at

    def readinto(self, buffer: Any) -> int:
        wanted = max(0, min(len(buffer), self._size - self._at))
        data = self._read_range(self._at, wanted)
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)


def cat_ranges(
    fs: fsspec.AbstractFileSystem,
    paths: Sequence[str],
    starts: Sequence[int],
    ends: Sequence[int],
) -> Sequence[bytes]:
    """Like `objects.cat_ranges`, but retries only the requests that failed."""
    found: dict[int, bytes] = {}

    def attempt() -> None:
        todo = [number for number in range(len(paths)) if number not in found]
        columns: Iterator[Sequence[Any]]
        columns = ([column[number] for number in todo] for column in (paths, starts, ends))
        answers = objects.cat_ranges(fs, *columns)
        failed = [answer for answer in answers if isinstance(answer, Exception)]
        found.update(
            (number, answer)
            for number, answer in zip(todo, answers, strict=True)
            if not isinstance(answer, Exception)
        )
        for error in sorted(failed, key=is_transient)[:1]:
            raise error

    retrying(attempt)
    return [found[number] for number in range(len(paths))]
