"""A recording from elsewhere, fetched whole: small ones by one request, long ones by several.

Into memory while it is small, because decoders seek and a seek on object storage is a request.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import IO, Any

import fsspec.asyn

from latentmill.errors import ConfigError, ItemError
from latentmill.storage.remote import (
    RANGE_NOT_SATISFIABLE,
    cause_of,
    is_transient,
    open_filesystem,
    protocol_of,
    retrying,
    status_of,
    storage_errors,
    why_not_opened,
)
from latentmill.text.redact import redact

MEMORY_LIMIT = 256 << 20
"""Bytes above which a fetched file goes to an unlinked temporary file instead of memory."""

PIECE = 8 << 20
IN_FLIGHT = 4
"""Bytes of a request, and requests at once, for a file that is longer."""

_FIRST_BYTE_SECONDS = 60.0
_SLOWEST = 64 << 10  # bytes per second; a request that is slower has hung
_LONGEST_SECONDS = 3600.0  # of a download whose length is not known


class _OtherSizeError(Exception):
    """The file is longer or shorter than it was said to be."""


def fetch(url: str, size: int | None = None) -> IO[bytes]:
    """The file at an fsspec URL as a file of this machine, unbuffered, without a name.

    Args:
        url: Where it is.
        size: Its bytes as a listing gave them, which saves a request; None if unknown.

    Raises:
        ItemError: It is missing, or cannot be fetched as a whole.
        ConfigError: The package for this kind of URL is not installed.
    """
    try:
        with _fetch_errors(url):
            if protocol_of(url) in ("http", "https"):
                return retrying(lambda: _stream(url))
            if size is not None:
                with contextlib.suppress(_OtherSizeError):  # it has changed: ask how long it is
                    return _by_ranges(url, size)
            return _by_ranges(url, None)
    except _OtherSizeError as error:
        raise ItemError(str(error)) from error
    except ImportError as error:
        raise ConfigError(f"{redact(url)}: {why_not_opened(url, error)}.") from error


def _by_ranges(url: str, size: int | None) -> IO[bytes]:
    """Object storage: any part of a file is one request."""
    filesystem, path = open_filesystem(url)
    if size is None:
        size = int(retrying(lambda: filesystem.info(path))["size"])
    with contextlib.ExitStack() as stack:
        target = stack.enter_context(memory_file() if size <= MEMORY_LIMIT else _disk_file())
        starts = range(0, size, PIECE)

        def copy(start: int) -> None:
            # One byte more than there should be, for a file that has grown.
            end = min(start + PIECE, size + 1)
            try:
                data = retrying(
                    lambda: _limited(filesystem, "cat_file", path, PIECE, start=start, end=end)
                )
            except storage_errors() as error:
                if status_of(error) != RANGE_NOT_SATISFIABLE:
                    raise
                data = b""  # it ends before `start`
            if len(data) != min(PIECE, size - start):
                text = f"fetching it gave {start + len(data)} of {size} bytes"
                raise _OtherSizeError(text)
            _write_at(target.fileno(), data, start)

        if len(starts) == 1:
            copy(0)
        elif starts:
            with ThreadPoolExecutor(IN_FLIGHT, thread_name_prefix="fetch") as pool:
                stack.callback(pool.shutdown, wait=True, cancel_futures=True)
                for done in [pool.submit(copy, start) for start in starts]:
                    done.result()
        stack.pop_all()  # from here on the caller closes it
    return target


def _stream(url: str) -> IO[bytes]:
    """Web servers: one request, for not all know ranges, and some then send the whole file."""
    filesystem, path = open_filesystem(url)
    # Unpacking would give another length than the header's.
    headers = {**filesystem.kwargs.get("headers", {}), "Accept-Encoding": "identity"}
    with contextlib.ExitStack() as stack:
        target = _Growing()
        stack.callback(target.close)
        limit = int(_LONGEST_SECONDS * _SLOWEST)
        _limited(filesystem, "get_file", path, limit, target, headers=headers)
        stack.pop_all()
    return target.file


def _limited(filesystem: Any, name: str, path: str, size: int, *args: Any, **kwargs: Any) -> Any:
    """Call a method of a file system with a time limit, which async ones can keep."""
    if not filesystem.async_impl:
        return getattr(filesystem, name)(path, *args, **kwargs)
    seconds = _FIRST_BYTE_SECONDS + size / _SLOWEST
    method = getattr(filesystem, f"_{name}")
    return fsspec.asyn.sync(filesystem.loop, method, path, *args, timeout=seconds, **kwargs)


class _Growing:
    """A file of unknown length: in memory, and on disk when it has become too long for that."""

    def __init__(self) -> None:
        self.file = memory_file()
        self._size = 0

    def write(self, data: bytes) -> int:
        if self._size <= MEMORY_LIMIT < self._size + len(data):
            with self.file as short:
                self.file = _disk_file()
                for start in range(0, self._size, PIECE):
                    _write_at(self.file.fileno(), os.pread(short.fileno(), PIECE, start), start)
        _write_at(self.file.fileno(), data, self._size)
        self._size += len(data)
        return len(data)

    def tell(self) -> int:
        return self._size

    def read(self, size: int = -1) -> bytes:
        raise NotImplementedError  # fsspec takes for a file what can read

    def close(self) -> None:
        self.file.close()


def memory_file(name: str = "audio") -> IO[bytes]:
    """An empty file in memory, unbuffered; `name` shows up in /proc only."""
    if hasattr(os, "memfd_create"):
        return open(os.memfd_create(name), "w+b", buffering=0)  # noqa: PTH123
    return _disk_file()


def _disk_file() -> IO[bytes]:
    return tempfile.TemporaryFile(buffering=0)


def _write_at(descriptor: int, data: bytes, start: int) -> None:
    view = memoryview(data)
    while view:
        written = os.pwrite(descriptor, view, start)
        view, start = view[written:], start + written


@contextlib.contextmanager
def _fetch_errors(url: str) -> Iterator[None]:
    """What a storage client raises, as an ItemError that names neither the place nor a secret."""
    try:
        yield
    except storage_errors(ValueError) as error:  # clients are imported by their first call
        status = status_of(error)
        if isinstance(error, FileNotFoundError) and not is_transient(error):
            raise ItemError("there is no such file") from error
        if isinstance(error, PermissionError) or status in (401, 403):
            raise ItemError("no permission to read the file") from error
        reason = cause_of(error)
        known = (url, url.partition("://")[2])
        if any(part and part in reason for part in known) or "://" in reason:
            reason = f"HTTP status {status}" if status else type(error).__name__
        raise ItemError(f"the file cannot be fetched: {reason}") from error
