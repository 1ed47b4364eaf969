"""Finds files on any storage by folder, glob or brace pattern, with their versions."""

from __future__ import annotations

import errno
import os
import posixpath
import stat
from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import braceexpand
from fsspec.implementations.local import LocalFileSystem

from latentmill.audio.media import path_of_file_url
from latentmill.errors import SourceError
from latentmill.sources.columns import is_text
from latentmill.sources.names import APPLE_DOUBLE, as_text, is_apple_double
from latentmill.storage import objects
from latentmill.storage.remote import (
    Retries,
    address,
    cause_of,
    is_missing,
    open_filesystem,
    open_for,
    refuse_secrets,
    retrying,
    storage_errors,
)

# Details in the listings of fsspec's file systems that change when a file changes.
VERSION_FIELDS: tuple[str, ...] = ("ETag", "etag", "mtime", "LastModified", "last_modified")
VERSION_FIELDS += ("Last-Modified", "blob_id", "sha256", "modify")

_WILDCARDS = ("*", "?", "[")
_REQUESTS = 16  # concurrent, when the files of a pattern are looked up one by one


@dataclass(frozen=True)
class File:
    """A file of a source.

    Attributes:
        uri: Absolute local path or fsspec URL.
        path: The path in its file system.
        name: Its path relative to the folder of the source.
        size: Bytes.
        version: A value that changes when the file changes; empty if unknown.
    """

    uri: str
    path: str
    name: str
    size: int
    version: str


class Place:
    """A file system and a path in it: a folder, a file, or a pattern of files.

    Attributes:
        fs: The file system.
        path: The path in `fs`.
        uri: The path with its protocol; local paths have none.
        local: Whether `fs` is the file system of this machine.
    """

    def __init__(self, uri: str) -> None:
        if uri.startswith("file://"):
            refuse_secrets("Source", uri, SourceError)
            uri = path_of_file_url(uri)
        self.fs, path = open_for("Source", uri, SourceError)
        self._opened = uri
        self.path: str = path.rstrip("/") or "/"
        self.local = isinstance(self.fs, LocalFileSystem)
        self.uri = self.address(self.path)

    def address(self, path: str) -> str:
        """A path of this file system with its protocol; local paths have none."""
        return path if self.local else address(self.fs, path, self._opened)

    @contextmanager
    def errors(self, verb: str = "listed") -> Iterator[None]:
        """Convert storage errors to a SourceError with the URI of the source."""
        try:
            yield
        except storage_errors(ValueError) as error:  # gcsfs: a bucket whose requester pays
            filename = getattr(error, "filename", None)
            raise SourceError(
                f"Source {self.uri} cannot be {verb}: {cause_of(error)}"
                f"{f' ({filename})' if filename else ''}."
            ) from error

    def kind(self) -> str:
        """`file`, `folder` or `nothing`. A pattern is `nothing`."""
        with self.errors():
            self.fs.invalidate_cache()
            try:
                # Not isfile and isdir: the first returns False after any error, the second lists a
                # whole folder of a bucket.
                kind = retrying(lambda: self.fs.info(self.path))["type"]
            except OSError as error:
                pattern = any(mark in self.path for mark in (*_WILDCARDS, "{"))
                if pattern or is_missing(error):  # some servers answer a pattern with 403
                    return "nothing"
                # A user may be allowed to list a folder but not to look up an object of its name.
                if isinstance(error, PermissionError) and retrying(
                    lambda: self.fs.isdir(self.path)
                ):
                    return "folder"
                raise
            return {"file": "file", "directory": "folder"}.get(kind, "nothing")


def version_of(info: Mapping[str, Any]) -> str:
    """The version in an entry of a remote file system; empty if there is none."""
    name = next((name for name in VERSION_FIELDS if info.get(name) is not None), None)
    found = "" if name is None else str(info[name]).strip('"')
    # FTP servers without MLSD report times that change with their age, such as "Nov 30 10:14".
    return "" if name == "modify" and " " in found else found


def check_name(source: str, path: str) -> None:
    """Raise SourceError if a path is not valid text, because a plan stores it."""
    if not is_text(path):
        raise SourceError(
            f"Source {as_text(source)} contains a file whose name is not UTF-8, "
            f"'{as_text(path)}': rename it, for example with convmv."
        )


def find_files(place: Place, extensions: Collection[str], ignored: dict[str, int]) -> list[File]:
    """The files of a folder, or those that a path, a glob or a brace pattern matches, sorted.

    Files that macOS creates beside others are counted in `ignored`, and in a folder also files
    without one of the extensions (`.tar`). Names are relative to the folder, or to the part of a
    pattern before its first wildcard. Raises SourceError if there are none, or if a file of a brace
    pattern is missing.
    """
    kind = place.kind()
    if kind == "folder":
        root = place.path
        with place.errors():
            found = retrying(lambda: place.fs.find(root, detail=True))
    elif kind == "file":
        root, found = posixpath.dirname(place.path), _looked_up(place, [place.path])
    else:
        patterns = list(braceexpand.braceexpand(place.path))
        root, found = _common_folder(patterns), _named(place, patterns)
    files = []
    for path, info in sorted(found.items()):
        name = path.removeprefix(root.rstrip("/") + "/")
        if kind != "file" and is_apple_double(name):
            ignored[APPLE_DOUBLE] = ignored.get(APPLE_DOUBLE, 0) + 1
            continue
        if kind == "folder" and not name.lower().endswith(tuple(extensions)):
            extension = posixpath.splitext(name)[1].lower()
            ignored[extension or "no extension"] = ignored.get(extension or "no extension", 0) + 1
            continue
        files.append(_file(place, path, name, info))
    if not files:
        raise SourceError(
            f"Source {place.uri} has no {' or '.join(sorted(extensions))} files: check the path."
            if kind == "folder"
            else f"Source {place.uri} does not exist: check the path."
        )
    return files


def _named(place: Place, patterns: list[str]) -> dict[str, Mapping[str, Any]]:
    """Entries of the files that match patterns without braces."""
    found: dict[str, Mapping[str, Any]] = {}
    plain = []
    for pattern in patterns:
        glob = any(mark in pattern for mark in _WILDCARDS)
        if glob and not (place.local and Path(pattern).exists()):
            with place.errors():
                found |= retrying(lambda p=pattern: place.fs.glob(p, detail=True))  # type: ignore[misc]
        else:
            plain.append(pattern)
    found |= _looked_up(place, plain)
    return {path: info for path, info in found.items() if info.get("type") != "directory"}


def _looked_up(place: Place, paths: list[str]) -> dict[str, Mapping[str, Any]]:
    """Entries of the files at these paths."""

    def look(path: str) -> Mapping[str, Any]:
        try:
            info: Mapping[str, Any] = retrying(lambda: place.fs.info(path))
        except FileNotFoundError as error:
            if is_missing(error):
                raise SourceError(
                    f"Source {place.address(path)} does not exist: check the path."
                ) from error
            raise
        return info

    with place.errors("read"), ThreadPoolExecutor(1 if place.local else _REQUESTS) as pool:
        return dict(zip(paths, pool.map(look, paths), strict=True))


def _file(place: Place, path: str, name: str, info: Mapping[str, Any]) -> File:
    check_name(place.uri, path)
    if place.local:  # in nanoseconds, because it is compared when the file is read
        status = os.stat(path)  # noqa: PTH116
        if not stat.S_ISREG(status.st_mode):  # opening a named pipe would block
            raise SourceError(f"{path} is not a regular file: exclude it.")
        return File(path, path, name, status.st_size, str(status.st_mtime_ns))
    if info.get("size") is None:  # such as index pages of web servers
        info = _looked_up(place, [path])[path]
    if info.get("size") is None:
        raise SourceError(
            f"{place.address(path)} cannot be read in parts because its server does not report its "
            "size: copy it to a disk or a bucket."
        )
    return File(place.address(path), path, name, int(info["size"]), version_of(info))


def _common_folder(patterns: list[str]) -> str:
    """The deepest folder that all patterns share, before their first wildcard."""
    protocol, mark, _ = patterns[0].rpartition("://")  # a web server's paths are URLs
    patterns = [pattern.removeprefix(protocol + mark) for pattern in patterns]
    folders = []
    for pattern in patterns:
        ends = [at for mark in _WILDCARDS if (at := pattern.find(mark)) >= 0]
        folders.append(posixpath.dirname(pattern[: min(ends)] if ends else pattern))
    return protocol + mark + posixpath.commonpath(folders) if all(folders) else ""


def current_version(uri: str, retries: Retries | None = None) -> tuple[int, str]:
    """Current size and version of a file.

    Raises OSError and other `storage_errors`.
    """
    if "://" not in uri:
        status = os.stat(uri)  # noqa: PTH116
        return status.st_size, str(status.st_mtime_ns)
    fs, path = open_filesystem(uri)
    fs.invalidate_cache(path)  # this process may have listed the folder while planning
    info = retrying(lambda: fs.info(path), retries)
    return int(info.get("size") or 0), version_of(info)


def read_bytes(
    uri: str, start: int = 0, end: int | None = None, retries: Retries | None = None
) -> bytes:
    """The bytes of a file from `start` to before `end`; fewer if it ends earlier.

    Raises OSError and other `storage_errors`.
    """
    if end is not None and end <= start:  # HTTP cannot express an empty range
        return b""
    if "://" not in uri:
        if not stat.S_ISREG(os.stat(uri).st_mode):  # noqa: PTH116  see `_file`
            raise OSError(errno.EINVAL, "It is not a regular file")
        with Path(uri).open("rb") as file:
            file.seek(start)
            return file.read(-1 if end is None else end - start)
    fs, path = open_filesystem(uri)
    if end is not None:
        return retrying(lambda: objects.cat_file(fs, path, start, end), retries)
    whole = partial(fs.cat_file, path, **({"start": start} if start else {}))
    return retrying(lambda: bytes(whole()), retries)
