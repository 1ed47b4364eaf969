"""The few things a store needs of its storage: whole writes, ranged reads, listing.

Everything is addressed by a path relative to the store's root. A write is all or nothing: on a
local disk a temporary file that is flushed and renamed, on object storage one put.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import shutil
import sys
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import fsspec
from fsspec.implementations.local import LocalFileSystem

from latentmill.errors import StorageError, StoreError

SCRATCH = "tmp"

# The extra of latentmill that brings a protocol's package.
EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs"} | dict.fromkeys(
    ("az", "abfs", "abfss", "adl"), "azure"
)

# What storage clients raise that is no OSError, by module.
CLIENT_ERRORS = (
    ("aiohttp", "ClientError"),
    ("botocore.exceptions", "BotoCoreError"),
    ("botocore.exceptions", "ClientError"),
    ("gcsfs.retry", "HttpError"),
    ("google.auth.exceptions", "GoogleAuthError"),
    ("azure.core.exceptions", "AzureError"),
)


def storage_errors() -> tuple[type[Exception], ...]:
    """What reading and writing may raise, with the storage clients that are in use."""
    clients = [getattr(sys.modules.get(module), name, None) for module, name in CLIENT_ERRORS]
    return (OSError, *(client for client in clients if client is not None))


def cause_of(error: Exception) -> str:
    """Why reading or writing failed, in a few words."""
    if isinstance(error, FileNotFoundError) and not error.strerror and "/" in str(error):
        return "no such file"  # fsspec gives the path alone
    text = (error.strerror if isinstance(error, OSError) else None) or str(error)
    return " ".join(text.split()).rstrip(".") or type(error).__name__


def why_not_opened(url: str, error: Exception) -> str:
    """Why fsspec refuses a URL, and what to install where a package is missing."""
    extra = EXTRAS.get(url.partition("://")[0])
    if isinstance(error, ImportError) and extra is not None:
        return f"a package is missing; pip install 'latentmill[{extra}]'"
    return cause_of(error)


class Storage:
    """A folder on a local disk or in a bucket (any fsspec URL). Picklable, survives a fork."""

    def __init__(self, url: str) -> None:
        if "::" in url:
            raise StoreError(f"Store {url} is a chained URL: name a plain folder or bucket.")
        try:
            self._opened, path = fsspec.core.url_to_fs(url)
        except (ValueError, ImportError) as error:
            cause = why_not_opened(url, error)
            raise StoreError(f"Store {url} cannot be opened: {cause}.") from error
        self._pid = os.getpid()
        self._path = path.rstrip("/")
        self.local = isinstance(self._opened, LocalFileSystem)
        self.root = self._path if self.local else str(self._opened.unstrip_protocol(self._path))

    def __reduce__(self) -> tuple[type[Storage], tuple[str]]:
        return Storage, (self.root,)

    @property
    def _fs(self) -> fsspec.AbstractFileSystem:
        """The file system, opened anew after a fork: the parent's connections are not ours."""
        if self._pid != os.getpid():
            self._opened, _ = fsspec.core.url_to_fs(self.root)
            self._pid = os.getpid()
        return self._opened

    def full(self, path: str) -> str:
        """The path as the file system knows it."""
        return f"{self._path}/{path}"

    def exists(self, path: str) -> bool:
        """Whether there is such a file."""
        with self._errors("look for", path):
            self._fs.invalidate_cache()
            return bool(self._fs.exists(self.full(path)))

    def list(self, folder: str) -> dict[str, int]:
        """Names and sizes of the files directly in a folder; empty if there is none."""
        with self._errors("list", folder):
            try:
                self._fs.invalidate_cache()
                entries = self._fs.ls(self.full(folder), detail=True)
            except FileNotFoundError:
                return {}
        files = (entry for entry in entries if entry["type"] == "file")
        return {file["name"].rsplit("/", 1)[-1]: int(file["size"]) for file in files}

    def read(self, path: str) -> bytes:
        """The whole file."""
        with self._errors("read", path):
            return bytes(self._fs.cat_file(self.full(path)))

    def read_if_exists(self, path: str) -> bytes | None:
        """The whole file, or None if there is none."""
        with self._errors("read", path):
            try:
                return bytes(self._fs.cat_file(self.full(path)))
            except FileNotFoundError:
                return None

    def read_range(self, path: str, offset: int, length: int) -> bytes:
        """`length` bytes from `offset` on: one positioned read or one ranged request.

        A local file that ends before gives fewer, object storage then may refuse the range.
        """
        if length == 0:  # there is no such range in HTTP: s3fs would read the whole file
            return b""
        with self._errors("read", path):
            if self.local:
                with Path(self.full(path)).open("rb", buffering=0) as file:
                    return os.pread(file.fileno(), length, offset)
            return bytes(self._fs.cat_file(self.full(path), start=offset, end=offset + length))

    @contextlib.contextmanager
    def open(self, path: str) -> Iterator[BinaryIO]:
        """The file, open for reading and seeking."""
        with self._errors("read", path), self._fs.open(self.full(path), "rb") as file:
            yield file

    def write(self, path: str, data: bytes) -> None:
        """Write a whole file, or nothing."""
        with self._errors("write", path):
            if not self.local:
                self._fs.pipe_file(self.full(path), data)
                return
            with self.scratch_file(path) as temporary:
                with temporary.open("wb") as file:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
                self._rename(temporary, path)

    def publish(self, temporary: Path, path: str) -> None:
        """Give a finished local file its place in the store, whole or not at all."""
        with self._errors("write", path):
            if not self.local:
                self._fs.put_file(str(temporary), self.full(path))
                return
            with temporary.open("rb+") as file:
                os.fsync(file.fileno())
            self._rename(temporary, path)

    def delete(self, path: str) -> None:
        """Remove a file, if it is there."""
        with self._errors("delete", path), contextlib.suppress(FileNotFoundError):
            self._fs.rm_file(self.full(path))

    @contextlib.contextmanager
    def scratch_file(self, path: str) -> Iterator[Path]:
        """A local place for a file that will become `path`; what is left of it is removed."""
        folder = self.scratch_folder
        with self._errors("write", path):
            folder.mkdir(parents=True, exist_ok=True)
            # Not mkstemp, which would hide the finished file from everyone but its writer.
            temporary = folder / f"{uuid.uuid4().hex}.{path.replace('/', '.')}"
            temporary.touch(exist_ok=False)
        try:
            yield temporary
        finally:
            temporary.unlink(missing_ok=True)

    @property
    def scratch_folder(self) -> Path:
        """Where temporary files live: inside a local store, else in this machine's own place."""
        if self.local:
            return Path(self._path) / SCRATCH
        digest = hashlib.sha256(self.root.encode()).hexdigest()[:16]
        return Path(tempfile.gettempdir()) / f"latentmill-{digest}"

    def clear_scratch(self) -> None:
        """Remove what killed runs left behind."""
        shutil.rmtree(self.scratch_folder, ignore_errors=True)

    def _rename(self, temporary: Path, path: str) -> None:
        target = Path(self.full(path))
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary.replace(target)
        folder = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # the name itself must survive a power cut
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # SMB, FUSE: not for folders
                raise
        finally:
            os.close(folder)

    @contextlib.contextmanager
    def _errors(self, verb: str, path: str) -> Iterator[None]:
        try:
            yield
        except storage_errors() as error:
            raise StorageError(f"Cannot {verb} {self.root}/{path}: {cause_of(error)}.") from error
