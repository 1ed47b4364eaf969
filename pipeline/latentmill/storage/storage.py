"""File operations of a store: atomic writes, range reads, listing.

All paths are relative to the store's root. A write is atomic: on a local disk, a temporary file is
flushed and renamed; on object storage, it is one put request.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import fsspec
from fsspec.implementations.local import LocalFileSystem

from latentmill.errors import ConfigError, StorageError, StoreError
from latentmill.storage import descriptors, hub, scratch
from latentmill.storage.ranged import RangedFile, cat_ranges
from latentmill.storage.remote import (
    Retries,
    address,
    advice_on,
    cause_of,
    is_transient,
    is_web,
    open_filesystem,
    open_for,
    protocol_of,
    retrying,
    status_of,
    storage_errors,
)
from latentmill.storage.uploads import upload

T = TypeVar("T")

READ_AHEAD = 1 << 20  # minimum bytes per read of an open remote file

CONDITIONAL = ("s3", "s3a")  # protocols that can replace an object only if it is unchanged

_SET_TMPDIR = "; set TMPDIR to a folder that you can write to and that has space"

# Names of the files that latentmill writes into a store.
_NAME_IN_STORE = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]*(/[A-Za-z0-9_-][A-Za-z0-9_.-]*)*")


def file_in_store(name: str) -> str:
    """Return a file name that was read from a store, if it is a relative path inside the store.

    Raises ValueError if it is absolute, a URL, or contains `..`, backslashes, NUL or the like.
    """
    if not _NAME_IN_STORE.fullmatch(name):
        raise ValueError(f"{name!r} is not the name of a file in a store")
    return name


class Storage:
    """A folder on a local disk or in a bucket (any fsspec URL). Picklable and fork-safe."""

    def __init__(self, url: str) -> None:
        self._opened, path = open_for("Store", url, StoreError)
        self._pid = os.getpid()
        self._path = path.rstrip("/")
        self.local = isinstance(self._opened, LocalFileSystem)
        self.root = self._path if self.local else address(self._opened, self._path, url)

    def __reduce__(self) -> tuple[type[Storage], tuple[str]]:
        return Storage, (self.root,)

    @property
    def _fs(self) -> fsspec.AbstractFileSystem:
        """The file system; reopened after a fork, which cannot share the parent's connections."""
        if self._pid != os.getpid():
            # Keep the parent's: deleting it would close its connections in another event loop.
            self._inherited = self._opened
            self._opened, _ = open_filesystem(self.root)
            self._pid = os.getpid()
        return self._opened

    def full(self, path: str) -> str:
        """The path in the file system; StorageError if it is outside of the folder.

        File names that are read from a store were checked before, by `file_in_store`.
        """
        if ".." in path and ".." in path.split("/"):
            raise StorageError(f"{path!r} leads out of {self.root}: use a path inside this folder.")
        return f"{self._path}/{path}"

    def named(self, path: str) -> str:
        """The path for messages, with that of the folder."""
        return f"{self.root}/{path}"

    def key_prefix(self, path: str) -> str:
        """Prefix that a view adds to the keys of a shard's records; empty for other stores."""
        return ""

    def exists(self, path: str) -> bool:
        """Whether the file or folder exists."""
        return self.version(path) is not None

    def list(self, folder: str) -> dict[str, int]:
        """Names and sizes of the files directly in a folder; empty if the folder does not exist."""
        with self._errors("list", folder):
            self._fs.invalidate_cache()
            path = self.full(folder)
            entries = self._unless_missing(lambda: self._fs.ls(path, detail=True)) or []
            files = (entry for entry in entries if entry["type"] == "file")
            return {file["name"].rsplit("/", 1)[-1]: self._size_of(file) for file in files}

    def folders(self, folder: str) -> Sequence[str]:
        """Names of the folders directly in a folder, sorted; empty if it does not exist.

        A link to a folder counts, and a web server that does not list its files has none.
        """
        with self._errors("list", folder):
            self._fs.invalidate_cache()
            path = self.full(folder)
            entries = self._unless_missing(lambda: self._fs.ls(path, detail=True)) or []
            found = (entry["name"] for entry in entries if entry["type"] == "directory")
            return sorted(name.rstrip("/").rsplit("/", 1)[-1] for name in found)

    def _size_of(self, entry: dict[str, Any]) -> int:
        size = entry["size"]
        if size is None:  # a web server's listing may have no sizes
            size = retrying(lambda: self._fs.info(entry["name"]))["size"]
        return int(size)

    def read(self, path: str) -> bytes:
        with self._errors("read", path):
            return bytes(retrying(lambda: self._fs.cat_file(self.full(path))))

    def read_if_exists(self, path: str) -> bytes | None:
        """Like `read`, but returns None if the file does not exist."""
        with self._errors("read", path):
            self._fs.invalidate_cache()
            found = self._unless_missing(lambda: self._fs.cat_file(self.full(path)))
            return None if found is None else bytes(found)

    def read_range(self, path: str, offset: int, length: int) -> bytes:
        """Read `length` bytes from `offset` with one positioned read or one range request.

        Beyond the end, a local file returns fewer bytes, and object storage may reject the range.
        """
        if length == 0:  # HTTP has no empty range: s3fs would read the whole file
            return b""
        with self._errors("read", path):
            if self.local:
                with Path(self.full(path)).open("rb", buffering=0) as file:
                    # `pread` allocates `length` bytes, which may be any number.
                    length = min(length, os.fstat(file.fileno()).st_size - offset)
                    return descriptors.read_at(file.fileno(), length, offset) if length > 0 else b""
            start, end, full = offset, offset + length, self.full(path)
            cat = partial(hub.cat_file, self._fs) if hub.is_hub(self._fs) else self._fs.cat_file
            data = retrying(lambda: cat(full, start=start, end=end))
            return self._of_range(path, data, length)

    def read_ranges(self, ranges: Sequence[tuple[str, int, int]]) -> Sequence[bytes]:
        """Read many ranges `(path, offset, length)`; see `read_range`.

        On object storage, the requests of one call run in parallel.
        """
        wanted = [number for number, (_, _, length) in enumerate(ranges) if length]
        if self.local or not wanted:
            return [self.read_range(*one) for one in ranges]
        paths, offsets, lengths = zip(*(ranges[number] for number in wanted), strict=True)
        ends = [offset + length for offset, length in zip(offsets, lengths, strict=True)]
        with self._errors("read", paths[0] if len(set(paths)) == 1 else f"{len(paths)} ranges"):
            found = cat_ranges(self._fs, [self.full(path) for path in paths], offsets, ends)
        data = [b""] * len(ranges)
        for number, part in zip(wanted, found, strict=True):
            data[number] = self._of_range(ranges[number][0], part, ranges[number][2])
        return data

    @contextlib.contextmanager
    def open(self, path: str) -> Iterator[BinaryIO]:
        """Open the file for reading and seeking."""
        with self._errors("read", path):
            if self.local:
                with Path(self.full(path)).open("rb") as file:
                    yield file
                return
            size = int(retrying(lambda: self._fs.info(self.full(path)))["size"])
            # Unlike fsspec's files, it retries after transient errors.
            remote = RangedFile(size, partial(self.read_range, path))
            with io.BufferedReader(remote, READ_AHEAD) as file:
                yield file

    def check_writable(self) -> None:
        """Called right before each write and each retry; `guard.py` overrides it."""

    def write(self, path: str, data: bytes) -> None:
        """Write a file atomically."""
        self.refuse_read_only()
        with self._errors("write", path):
            if not self.local:
                self._retry_write(lambda: self._fs.pipe_file(self.full(path), data))
                return
            with self._written(path, data) as temporary:
                self.check_writable()
                self._rename(temporary, path)

    def create(self, path: str, data: bytes) -> bool:
        """Write a new file; of two processes that try at the same time, one succeeds.

        Returns True if the file now contains `data`, False if there is another file, which stays.
        A server without conditional writes (`If-None-Match`) replaces the file.
        """
        self.refuse_read_only()
        with self._errors("write", path):
            if self.local:
                with self._written(path, data) as temporary:
                    new = self._unless_refused(
                        partial(self._rename, temporary, path, replace=False)
                    )
            else:
                full = self.full(path)
                new = self._unless_refused(lambda: self._fs.pipe_file(full, data, mode="create"))
            # This process may have written it, by a request whose response was lost.
            return new or self.read_if_exists(path) == data

    def version(self, path: str) -> str | None:
        """The version for `replace`: an object's ETag; None if the file does not exist."""
        with self._errors("look for", path):
            self._fs.invalidate_cache()
            # Not fs.exists: many clients return False for any error.
            found = self._unless_missing(lambda: self._fs.info(self.full(path)))
            return None if found is None else str(found.get("ETag", ""))

    def replace(self, path: str, data: bytes, version: str | None) -> bool:
        """Replace a file atomically if it still has the expected version.

        Returns False if the file has another version, which stays. Only S3 compares versions; other
        storage replaces any version. If `version` is None, this is `create`.
        """
        if version is None:
            return self.create(path, data)
        if protocol_of(self.root) not in CONDITIONAL or not version:
            Storage.write(self, path, data)  # not self.write: in `guard.py`, it calls this method
            return True
        with self._errors("write", path):
            full = self.full(path)
            new = self._unless_refused(lambda: self._fs.pipe_file(full, data, IfMatch=version))
            return new or self.read_if_exists(path) == data

    def publish(
        self, temporary: Path, path: str, on_bytes: Callable[[], object] = lambda: None
    ) -> bool:
        """Move a finished local file into the store atomically, under a new name.

        Returns False if a file of that name exists already; that file stays. `on_bytes` is called,
        in any thread, whenever bytes of an upload have arrived.
        """
        self.refuse_read_only()
        with self._errors("write", path):
            if self.local:
                with temporary.open("rb+") as file:
                    os.fsync(file.fileno())
                return self._unless_refused(partial(self._rename, temporary, path, replace=False))
            full, retries = self.full(path), Retries(on_bytes)
            send = partial(upload, on_bytes=retries.progress)
            return self._unless_refused(lambda: send(self._fs, temporary, full), retries)

    def delete(self, path: str) -> None:
        """Remove a file if it exists."""
        self.refuse_read_only()
        with self._errors("delete", path):
            self.check_writable()
            self._unless_missing(lambda: self._fs.rm_file(self.full(path)))

    def _retry_write(self, write: Callable[[], object], retries: Retries | None = None) -> None:
        def attempt() -> None:
            self.check_writable()
            write()

        retrying(attempt, retries)

    def _unless_refused(self, write: Callable[[], object], retries: Retries | None = None) -> bool:
        """Make a conditional write; False if its condition was not met."""
        try:
            self._retry_write(write, retries)
        except storage_errors() as error:
            if not isinstance(error, FileExistsError) and status_of(error) != 412:
                raise
            return False
        return True

    def refuse_read_only(self) -> None:
        """Raise ConfigError if the storage is a web server, which cannot be written to."""
        if is_web(self.root):
            raise ConfigError(
                f"The output {self.root} cannot be written because {protocol_of(self.root)} is "
                "read-only: use a folder or a bucket."
            )

    @contextlib.contextmanager
    def scratch_file(self, path: str) -> Iterator[Path]:
        """A temporary local file in which to write what `publish` moves to `path`."""
        folder = self.scratch_folder
        with contextlib.ExitStack() as stack:
            with self._errors("write", path) if self.local else writing(str(folder), _SET_TMPDIR):
                file = scratch.temporary_file(folder, path.replace("/", "."))
                temporary = stack.enter_context(file)
            yield temporary

    @property
    def real_root(self) -> str:
        """The root without symbolic links, to find out whether two are the same folder."""
        return os.path.realpath(self.root) if self.local else self.root

    @property
    def scratch_folder(self) -> Path:
        """The folder of temporary files: in a local store, or the user's own in TMPDIR."""
        if self.local:
            return Path(self._path) / scratch.SCRATCH
        digest = hashlib.sha256(self.root.encode()).hexdigest()[:16]
        return Path(tempfile.gettempdir()) / f"latentmill-{os.geteuid()}-{digest}"

    def clear_scratch(self) -> None:
        """Remove temporary files of killed processes; keep files that are being written."""
        scratch.clear(self.scratch_folder)

    @contextlib.contextmanager
    def _written(self, path: str, data: bytes) -> Iterator[Path]:
        """Write `data` to a temporary local file, flushed to disk, to be renamed."""
        with self.scratch_file(path) as temporary:
            with temporary.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            yield temporary

    def _rename(self, temporary: Path, path: str, *, replace: bool = True) -> None:
        target = Path(self.full(path))
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
        except FileExistsError as error:  # a file has the name of the folder
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR)) from error
        if replace:
            temporary.replace(target)
        else:
            scratch.link(temporary, target)
        folder = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # the name itself must survive a power failure
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # SMB and FUSE cannot sync folders
                raise
        finally:
            os.close(folder)

    def _unless_missing(self, call: Callable[[], T]) -> T | None:
        """Call with retries; return None if the file does not exist."""
        try:
            return retrying(call)
        except FileNotFoundError as error:
            if is_transient(error):  # fsspec's http also raises it when a server fails
                raise
            return None

    def _of_range(self, path: str, data: bytes, length: int) -> bytes:
        # fsspec's http returns the whole file if the server ignores the range.
        if len(data) > length:
            raise StorageError(
                f"Cannot read {self.root}/{path} in parts: its server does not support range "
                "requests; copy the store to a disk or a bucket."
            )
        return bytes(data)

    @contextlib.contextmanager
    def _errors(self, verb: str, path: str) -> Iterator[None]:
        try:
            yield
        except storage_errors() as error:
            cause = f"{cause_of(error, writing=verb == 'write')}{advice_on(error)}"
            raise StorageError(f"Cannot {verb} {self.root}/{path}: {cause}.") from error


@contextlib.contextmanager
def writing(place: str, advice: str = "") -> Iterator[None]:
    """Turn an OSError from writing a local file to `place` into a StorageError.

    `advice` is the end of its sentence; without it, `advice_on` says what to do.
    """
    try:
        yield
    except OSError as error:
        # pyarrow's message is long; the error number has a short one.
        cause = os.strerror(error.errno) if error.errno else str(error)
        raise StorageError(f"Cannot write {place}: {cause}{advice or advice_on(error)}.") from error
