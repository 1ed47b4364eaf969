"""One recording's bytes as a real file: seekable, with a descriptor that C decoders read from.

A local file is opened where it lies and never read whole. Anything else is fetched whole, into
memory while it is small, because decoders seek and a seek on object storage is a request.
"""

from __future__ import annotations

import contextlib
import os
import re
import stat
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

import xxhash

from latentmill.errors import ConfigError, ItemError

MEMORY_LIMIT = 256 << 20
"""Bytes above which a fetched file goes to an unlinked temporary file instead of memory."""

_PIECE = 1 << 20
_FETCH_PIECE = 16 << 20
_URL = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]*(://|::)")


class MediaFile:
    """The bytes of one recording. A context manager; the decoders read from its descriptor.

    The decoders share its file position: one stream at a time may be open on it.

    Attributes:
        size: Bytes.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.size = os.fstat(file.fileno()).st_size

    def fileno(self) -> int:
        """The file descriptor; it stays the MediaFile's own."""
        return self._file.fileno()

    def rewind(self) -> int:
        """Set the position to the first byte, for a decoder to start, and return `fileno()`."""
        os.lseek(self.fileno(), 0, os.SEEK_SET)
        return self.fileno()

    def read_at(self, offset: int, size: int) -> bytes:
        """Up to `size` bytes from `offset`, fewer at the end; leaves the position alone."""
        if offset >= self.size:  # also what no file system can address
            return b""
        try:
            return os.pread(self.fileno(), size, offset)
        except OSError as error:
            raise ItemError(f"the file cannot be read: {_reason(error)}") from error

    @cached_property
    def content_hash(self) -> str:
        """`xxh3:` and the 128-bit XXH3 of all bytes, in hex."""
        digest = xxhash.xxh3_128()
        offset = 0
        while piece := self.read_at(offset, _PIECE):
            digest.update(piece)
            offset += len(piece)
        if offset != self.size:
            raise ItemError(f"the file was cut to {offset} of {self.size} bytes while it was read")
        return f"xxh3:{digest.hexdigest()}"

    def close(self) -> None:
        """Close the file. Closing twice is fine."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def open_media(uri: str) -> MediaFile:
    """Open the file at `uri`: a local path, a `file://` URL or any fsspec URL.

    Raises:
        ItemError: It is missing, not a regular file, or cannot be read or fetched.
        ConfigError: The package for this kind of URL is not installed.
    """
    if uri.startswith("file://"):
        return _open_local(Path(uri.removeprefix("file://")))
    if not _URL.match(uri):
        return _open_local(Path(uri))
    return _fetch(uri)


def media_from_bytes(data: bytes, name: str = "bytes") -> MediaFile:
    """A MediaFile of `data` held in memory; `name` shows up in /proc only."""
    file = _memory_file(name)
    file.write(data)
    return MediaFile(file)


def _open_local(path: Path) -> MediaFile:
    try:
        # Opening a named pipe would wait for its writer, so look before opening.
        if not stat.S_ISREG(path.stat().st_mode):
            raise ItemError("it is not a regular file")
        return MediaFile(path.open("rb", buffering=0))
    except FileNotFoundError as error:
        raise ItemError("there is no such file") from error
    except PermissionError as error:
        raise ItemError("no permission to read the file") from error
    except (OSError, ValueError) as error:  # ValueError: a null byte in the name
        raise ItemError(f"the file cannot be opened: {_reason(error)}") from error


def _fetch(uri: str) -> MediaFile:
    from fsspec.core import url_to_fs

    try:
        with _fetch_errors(uri):
            filesystem, path = url_to_fs(uri)
            size: int | None = filesystem.size(path)
            if size is not None and size <= MEMORY_LIMIT:
                media = media_from_bytes(filesystem.cat_file(path))
            else:
                media = _copy_to_disk(filesystem, path)
    except ImportError as error:
        raise ConfigError(f"this kind of URL needs a package: {error}") from error
    if size is not None and media.size != size:
        media.close()
        raise ItemError(f"fetching it gave {media.size} of {size} bytes")
    return media


def _copy_to_disk(filesystem: Any, path: str) -> MediaFile:
    with contextlib.ExitStack() as stack:
        target = stack.enter_context(tempfile.TemporaryFile(buffering=0))
        with filesystem.open(path, "rb", block_size=_FETCH_PIECE) as remote:
            while piece := remote.read(_FETCH_PIECE):
                target.write(piece)
        stack.pop_all()  # from here on the MediaFile closes it
    return MediaFile(target)


def _memory_file(name: str) -> IO[bytes]:
    if hasattr(os, "memfd_create"):
        return open(os.memfd_create(name), "w+b", buffering=0)  # noqa: PTH123
    return tempfile.TemporaryFile(buffering=0)


@contextmanager
def _fetch_errors(uri: str) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        raise ItemError("there is no such file") from error
    except PermissionError as error:
        raise ItemError("no permission to read the file") from error
    except _fetch_error_types() as error:
        # The text of a client's error may hold the URL, and a signed URL is a secret.
        reason = _reason(error)
        known = (uri, uri.partition("://")[2])
        if any(part and part in reason for part in known) or "://" in reason:
            reason = type(error).__name__
        raise ItemError(f"the file cannot be fetched: {reason}") from error


def _fetch_error_types() -> tuple[type[Exception], ...]:
    """What fetching may raise: the storage clients in use have errors that are no OSError."""
    names = [
        ("aiohttp", "ClientError"),
        ("botocore.exceptions", "BotoCoreError"),
        ("botocore.exceptions", "ClientError"),
        ("gcsfs.retry", "HttpError"),
        ("google.auth.exceptions", "GoogleAuthError"),
        ("azure.core.exceptions", "AzureError"),
    ]
    modules = [(sys.modules.get(module), name) for module, name in names]
    clients = [getattr(module, name) for module, name in modules if hasattr(module, name)]
    return (OSError, ValueError, *clients)


def _reason(error: Exception) -> str:
    text = (error.strerror if isinstance(error, OSError) else None) or str(error)
    return " ".join(text.split()) or type(error).__name__
