"""The bytes of a recording as a seekable file with a descriptor that C decoders read from.

A local file is opened in place, and only read as a whole if it is small. A remote file is fetched
as a whole.
"""

from __future__ import annotations

import contextlib
import os
import re
import stat
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import IO
from urllib.parse import unquote

import xxhash

from latentmill.audio.fetch import MemoryFile, fetch, local_file
from latentmill.errors import ItemError
from latentmill.storage.closeable import Closeable
from latentmill.storage.descriptors import read_at, write_at
from latentmill.storage.remote import cause_of, own_limits

_PIECE = 1 << 20
_SMALL = 1 << 20  # bytes of a file that is read once, and not by each check on its own
_URL = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]*(://|::)")


class MediaFile(Closeable):
    """The bytes of one recording. A context manager; the decoders read from its descriptor.

    The decoders share its file position: one stream at a time may be open on it.

    Attributes:
        size: Bytes.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._data: bytes | None = None  # of a small file, once it is read
        self.size = os.fstat(file.fileno()).st_size

    def fileno(self) -> int:
        """The file descriptor; the MediaFile closes it."""
        return self._file.fileno()

    def rewind(self) -> int:
        """Set the position to the first byte and return `fileno()`."""
        os.lseek(self.fileno(), 0, os.SEEK_SET)
        return self.fileno()

    def reopened(self) -> MediaFile:
        """A second MediaFile of the same bytes, with its own file position."""
        try:
            if isinstance(self._file, MemoryFile):
                return MediaFile(self._file.reopened())
            return MediaFile(Path(f"/proc/self/fd/{self.fileno()}").open("rb", buffering=0))
        except OSError:  # not Linux
            return media_from_bytes(self.read_at(0, self.size))

    def read_if_small(self) -> None:
        """Read a small file into memory, for the checks and the hash; larger ones are left."""
        if self._data is None and self.size <= _SMALL:
            self._data = self.read_at(0, self.size)

    def read_at(self, offset: int, size: int) -> bytes:
        """Up to `size` bytes from `offset`, fewer at the end; does not change the position."""
        if offset >= self.size:  # also for offsets that no file system supports
            return b""
        if self._data is not None and offset >= 0 and size >= 0:
            return self._data[offset : offset + size]
        try:  # a damaged header may give any size, and pread allocates it
            return read_at(self.fileno(), min(size, self.size - offset), offset)
        except OSError as error:
            raise ItemError(f"the file cannot be read: {cause_of(error)}") from error

    @cached_property
    def content_hash(self) -> str:
        """`xxh3:` and the 128-bit XXH3 of all bytes, in hex."""
        digest = xxhash.xxh3_128()
        offset = 0
        while piece := self.read_at(offset, _PIECE):
            digest.update(piece)
            offset += len(piece)
        left = min(offset, os.fstat(self.fileno()).st_size)  # a small file was read before
        if left < self.size:
            raise ItemError(
                f"the file was truncated to {left} of {self.size} bytes while it was read"
            )
        return f"xxh3:{digest.hexdigest()}"

    def close(self) -> None:
        """Close the file. Further calls do nothing."""
        self._file.close()
        self._data = None


@own_limits()
def open_media(
    uri: str, size: int | None = None, on_bytes: Callable[[], object] = lambda: None
) -> MediaFile:
    """Open the file at `uri`: a local path, a `file://` URL or any fsspec URL.

    Args:
        uri: Path or URL.
        size: Bytes of a remote file, if known; this saves a request.
        on_bytes: Called, in any thread, whenever bytes of a remote file have arrived.

    Raises:
        ItemError: It is missing, not a regular file, or cannot be read or fetched.
        ConfigError: The package for this kind of URL is not installed.
        StorageError: This machine has no space for it, or too many open files.
    """
    if uri.startswith("file://"):
        return _open_local(Path(path_of_file_url(uri)))
    if not is_remote(uri):
        return _open_local(Path(uri))
    return MediaFile(fetch(uri, size, on_bytes))


def path_of_file_url(url: str) -> str:
    """The path of a `file://` URL with `%20` and other escapes decoded (RFC 8089)."""
    path = url.removeprefix("file://")
    host, _, rest = path.partition("/")
    return unquote(f"/{rest}" if host == "localhost" else path)


def is_remote(uri: str) -> bool:
    """Whether opening `uri` fetches it: any URL except `file://`."""
    return _URL.match(uri) is not None and not uri.startswith("file://")


@own_limits()
def media_from_bytes(data: bytes, name: str = "bytes") -> MediaFile:
    """A MediaFile of `data`, in memory if the limits allow it; `name` only appears in /proc.

    Raises StorageError if this machine has no space for it.
    """
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(local_file(len(data), name))
        write_at(file.fileno(), data, 0)
        media = MediaFile(file)
        stack.pop_all()  # the caller closes it
    return media


def _open_local(path: Path) -> MediaFile:
    try:
        # Check first, because opening a named pipe would block.
        if not stat.S_ISREG(path.stat().st_mode):
            raise ItemError("it is not a regular file")
        return MediaFile(path.open("rb", buffering=0))
    except FileNotFoundError as error:
        raise ItemError("there is no such file") from error
    except PermissionError as error:
        raise ItemError("no permission to read the file") from error
    except (OSError, ValueError) as error:  # ValueError: a null byte in the name
        raise ItemError(f"the file cannot be opened: {cause_of(error)}") from error
