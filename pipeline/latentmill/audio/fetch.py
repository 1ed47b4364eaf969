"""Fetches whole remote recordings: small ones with one request, large ones with several.

They are fetched whole, because decoders seek and each seek on object storage would be a request.
"""

from __future__ import annotations

import contextlib
import io
import os
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import IO, ClassVar

from latentmill.errors import ConfigError, ItemError
from latentmill.storage import objects
from latentmill.storage.descriptors import read_at, write_at
from latentmill.storage.outages import ItemRetries
from latentmill.storage.remote import (
    RANGE_NOT_SATISFIABLE,
    Retries,
    cause_of,
    is_transient,
    is_web,
    open_filesystem,
    own_limits,
    retrying,
    status_of,
    storage_errors,
    why_not_opened,
)
from latentmill.text.redact import redact

MEMORY_LIMIT = 256 << 20
"""Bytes above which a fetched file goes to an unlinked temporary file instead of memory."""

PROCESS_LIMIT = 1 << 30
"""The same for all recordings that this process has in memory together."""

PIECE = 8 << 20
IN_FLIGHT = 4
"""Larger files are fetched with `IN_FLIGHT` concurrent requests of `PIECE` bytes."""

_FIRST_BYTE_SECONDS = 60.0
_SLOWEST = 64 << 10  # bytes per second on average; slower requests are given up


class _OtherSizeError(Exception):
    """The file is longer or shorter than expected."""


def fetch(
    url: str, size: int | None = None, on_bytes: Callable[[], object] = lambda: None
) -> IO[bytes]:
    """Fetch the file at an fsspec URL to a local file, unbuffered and without a name.

    A known `size` saves a request. `on_bytes` is called, in any thread, whenever bytes have
    arrived, because a download may take hours. Raises ItemError if the file is missing or cannot
    be fetched as a whole, and ConfigError if the package for this kind of URL is not installed.
    """
    retries = ItemRetries(url, on_bytes)
    try:
        if is_web(url):
            return retrying(lambda: _stream(url, retries.progress), retries)
        if size is not None:
            with contextlib.suppress(_OtherSizeError):  # it has changed: look up its size
                return _by_ranges(url, size, retries)
        return _by_ranges(url, None, retries)
    except _OtherSizeError as error:
        raise ItemError(str(error)) from error
    except ImportError as error:
        raise ConfigError(f"{redact(url)}: {why_not_opened(url, error)}.") from error
    except storage_errors(ValueError) as error:  # clients are imported by their first call
        raise ItemError(_why_not_fetched(url, error)) from error


def _why_not_fetched(url: str, error: Exception) -> str:
    """Describe an error of a storage client without URLs and secrets."""
    status = status_of(error)
    if isinstance(error, FileNotFoundError) and not is_transient(error):
        return "there is no such file"
    if status in (401, 403):
        return "no permission to read the file"
    reason = cause_of(error)
    known = (url, url.partition("://")[2])
    private = any(part and part in reason for part in known) or "://" in reason
    if isinstance(error, PermissionError):  # such as a token that has expired
        return "no permission to read the file" + ("" if private else f" ({reason})")
    if private:
        reason = f"HTTP status {status}" if status else type(error).__name__
    return f"the file cannot be fetched: {reason}"


def _by_ranges(url: str, size: int | None, retries: Retries) -> IO[bytes]:
    """Fetch from object storage, where each range is one request."""
    filesystem, path = open_filesystem(url)
    if size is None:
        size = int(retrying(lambda: filesystem.info(path), retries)["size"])
    with contextlib.ExitStack() as stack:
        target = stack.enter_context(local_file(size))
        starts = range(0, size, PIECE)

        def copy(start: int) -> None:
            # One byte more than expected, to notice a file that has grown.
            end = min(start + PIECE, size + 1)
            try:
                data = retrying(
                    lambda: objects.cat_file(filesystem, path, start, end, _seconds(PIECE)), retries
                )
            except storage_errors() as error:
                if status_of(error) != RANGE_NOT_SATISFIABLE:
                    raise
                data = b""  # it ends before `start`
            if len(data) != min(PIECE, size - start):
                text = f"fetching it gave {start + len(data)} of {size} bytes"
                raise _OtherSizeError(text)
            write_at(target.fileno(), data, start)
            retries.progress()

        if len(starts) == 1:
            copy(0)
        elif starts:
            with ThreadPoolExecutor(IN_FLIGHT, thread_name_prefix="fetch") as pool:
                stack.callback(pool.shutdown, wait=True, cancel_futures=True)
                for done in [pool.submit(copy, start) for start in starts]:
                    done.result()
        stack.pop_all()  # the caller closes it
    return target


def _stream(url: str, on_bytes: Callable[[], object]) -> IO[bytes]:
    """Fetch from a web server with one request: some support no ranges and send the whole file."""
    filesystem, path = open_filesystem(url)
    # Decompressed data would not have the length in the header.
    headers = {**filesystem.kwargs.get("headers", {}), "Accept-Encoding": "identity"}
    with contextlib.ExitStack() as stack:
        target = _Growing(on_bytes)
        stack.callback(target.close)
        filesystem.get_file(path, target, headers=headers)
        stack.pop_all()
    return target.file


def _seconds(size: int) -> float:
    """The time limit of a request for up to `size` bytes."""
    return _FIRST_BYTE_SECONDS + size / _SLOWEST


class _Growing:
    """A file of unknown length that moves from memory to disk above the limits.

    Raises OSError if it arrives too slowly. The client notices if nothing arrives.
    """

    def __init__(self, on_bytes: Callable[[], object]) -> None:
        self.file = _memory_file()
        self._on_bytes = on_bytes
        self._size = 0
        self._began = time.monotonic()

    def write(self, data: bytes) -> int:
        if isinstance(self.file, MemoryFile) and not self.file.reserve(self._size + len(data)):
            with self.file as short:
                self.file = _disk_file()
                for start in range(0, self._size, PIECE):
                    write_at(self.file.fileno(), read_at(short.fileno(), PIECE, start), start)
        write_at(self.file.fileno(), data, self._size)
        self._size += len(data)
        self._on_bytes()
        if time.monotonic() - self._began > _seconds(self._size):
            raise OSError(f"it arrives at less than {_SLOWEST >> 10} KiB/s")
        return len(data)

    def tell(self) -> int:
        return self._size

    def read(self, size: int = -1) -> bytes:
        raise NotImplementedError  # fsspec recognises files by this method

    def close(self) -> None:
        self.file.close()


def local_file(size: int, name: str = "audio") -> IO[bytes]:
    """An empty unbuffered file without a name, in memory if the limits allow `size` bytes.

    `name` only appears in /proc.
    """
    file = _memory_file(name)
    if isinstance(file, MemoryFile) and not file.reserve(size):
        file.close()
        return _disk_file()
    return file


def _memory_file(name: str = "audio") -> IO[bytes]:
    """An empty unbuffered file in memory, or on disk if the system has no files in memory."""
    if hasattr(os, "memfd_create"):
        with own_limits():
            return MemoryFile(os.memfd_create(name), "w+b", _Reservation())
    return _disk_file()


def _disk_file() -> IO[bytes]:
    with own_limits():
        return tempfile.TemporaryFile(buffering=0)


class _Reservation:
    """Bytes of one recording in memory. They are released when its last file is closed."""

    total: ClassVar[int] = 0  # of all recordings of this process
    # Reentrant, because the garbage collector may close a file in a thread that holds it.
    lock: ClassVar[threading.RLock] = threading.RLock()

    def __init__(self) -> None:
        self._size = self._files = 0

    def open(self) -> None:
        with self.lock:
            self._files += 1

    def close(self) -> None:
        with self.lock:
            self._files -= 1
            if not self._files:
                _Reservation.total -= self._size
                self._size = 0

    def grow(self, size: int) -> bool:
        """Reserve `size` bytes in total. Returns False if a limit does not allow it."""
        with self.lock:
            total = self.total - self._size + size
            if size > MEMORY_LIMIT or total > PROCESS_LIMIT:
                return False
            self._size, _Reservation.total = size, total
        return True


class MemoryFile(io.FileIO):
    """An unbuffered file in memory. Reserve its bytes before you write them."""

    _reservation: _Reservation | None = None

    def __init__(self, descriptor: int, mode: str, reservation: _Reservation) -> None:
        super().__init__(descriptor, mode)
        reservation.open()
        self._reservation = reservation

    def reserve(self, size: int) -> bool:
        """Reserve memory for `size` bytes in total. Returns False if a limit does not allow it."""
        return self._reservation is not None and self._reservation.grow(size)

    def reopened(self) -> MemoryFile:
        """A second file of the same bytes, with its own position. Needs Linux."""
        if self._reservation is None:
            raise ValueError("the file is closed")
        descriptor = os.open(f"/proc/self/fd/{self.fileno()}", os.O_RDONLY)
        return MemoryFile(descriptor, "rb", self._reservation)

    def close(self) -> None:
        super().close()
        with _Reservation.lock:
            reservation, self._reservation = self._reservation, None
            if reservation is not None:
                reservation.close()
