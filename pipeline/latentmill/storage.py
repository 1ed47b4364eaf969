"""The few things a store needs of its storage: whole writes, ranged reads, listing.

Everything is addressed by a path relative to the store's root. A write is all or nothing: on a
local disk a temporary file that is flushed and renamed, on object storage one put.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import fsspec
from fsspec.implementations.local import LocalFileSystem

from latentmill.errors import StorageError, StoreError

SCRATCH = "tmp"


class Storage:
    """A folder on a local disk or in a bucket (any fsspec URL). Picklable, not thread-bound."""

    def __init__(self, url: str) -> None:
        try:
            self._fs, path = fsspec.core.url_to_fs(url)
        except (ValueError, ImportError) as error:
            raise StoreError(f"Store {url} cannot be opened: {error}.") from error
        self._path = path.rstrip("/")
        self.local = isinstance(self._fs, LocalFileSystem)
        self.root = self._path if self.local else str(self._fs.unstrip_protocol(self._path))

    def __reduce__(self) -> tuple[type[Storage], tuple[str]]:
        return Storage, (self.root,)

    def full(self, path: str) -> str:
        """The path as the file system knows it."""
        return f"{self._path}/{path}"

    def exists(self, path: str) -> bool:
        """Whether there is such a file."""
        with self._errors("look for", path):
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
        """`length` bytes from `offset` on: one positioned read or one ranged request."""
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
            handle, name = tempfile.mkstemp(dir=folder, suffix="." + path.replace("/", "."))
            os.close(handle)
        try:
            yield Path(name)
        finally:
            Path(name).unlink(missing_ok=True)

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
        finally:
            os.close(folder)

    @contextlib.contextmanager
    def _errors(self, verb: str, path: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            cause = error.strerror or str(error) or type(error).__name__
            raise StorageError(f"Cannot {verb} {self.root}/{path}: {cause}.") from error
