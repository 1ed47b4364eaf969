"""A folder or bucket of audio files, with sidecar files that become metadata."""

from __future__ import annotations

import errno
import os
import posixpath
from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

from latentmill.errors import SourceError
from latentmill.sources.base import Item, Listing
from latentmill.storage import cause_of, storage_errors, why_not_opened

SIDECARS = (".json", ".txt")

# What the file systems call that which changes when a file does.
VERSION_FIELDS = ("ETag", "etag", "mtime", "LastModified")


class FolderSource:
    """Every audio file below a folder, which may be any fsspec URL.

    A key is the file's path relative to the folder without its extension; where several audio
    files share that, all of them keep their extensions. `song.json` and `song.txt` beside
    `song.wav` are its sidecars, and `song.wav.json` too.
    """

    def __init__(self, uri: str, extensions: Collection[str]) -> None:
        self._extensions = frozenset("." + e.lower().lstrip(".") for e in extensions)
        if "::" in uri:
            raise SourceError(f"Source {uri} is a chained URL: name a plain folder or bucket.")
        try:
            self._fs, self._root = fsspec.core.url_to_fs(uri)
        except (ValueError, ImportError) as error:
            cause = why_not_opened(uri, error)
            raise SourceError(f"Source {uri} cannot be opened: {cause}.") from error
        self._root = self._root.rstrip("/") or "/"
        self.uri = self._address(self._root)

    def list(self) -> Listing:
        """List the items; see `Source.list`."""
        files = self._find()
        self._check_names(files)
        audio: list[str] = []
        sidecars: dict[str, list[str]] = defaultdict(list)
        ignored: Counter[str] = Counter()
        for path in sorted(files):
            stem, extension = posixpath.splitext(path)
            if extension.lower() in self._extensions:
                audio.append(path)
            elif extension.lower() in SIDECARS:
                sidecars[stem].append(path)
            else:
                ignored[extension.lower() or "no extension"] += 1
        if not audio:
            raise SourceError(
                f"Source {self.uri} holds no audio files: looked for "
                f"{', '.join(sorted(self._extensions))} in {len(files)} files."
            )
        owners = {*audio, *(posixpath.splitext(path)[0] for path in audio)}
        for stem, orphans in sidecars.items():
            if stem not in owners:
                ignored.update(posixpath.splitext(path)[1].lower() for path in orphans)
        names = _names(audio)
        items = [self._item(path, names[path], files[path], sidecars) for path in audio]
        return Listing(tuple(sorted(items, key=lambda item: item.key)), dict(ignored))

    def _find(self) -> Mapping[str, Mapping[str, Any]]:
        """Every file below the folder with its size and version."""
        try:
            self._fs.invalidate_cache()
            if self._fs.isfile(self._root):
                raise SourceError(f"Source {self.uri} is a file: name the folder that holds it.")
            if not self._fs.isdir(self._root):
                raise SourceError(f"Source {self.uri} does not exist: check the path.")
            if isinstance(self._fs, LocalFileSystem):
                return _walk(self._root)
            found: dict[str, dict[str, Any]] = self._fs.find(self._root, detail=True)
        except storage_errors() as error:
            filename = getattr(error, "filename", None)
            raise SourceError(
                f"Source {self.uri} cannot be listed: {cause_of(error)}"
                f"{f' ({filename})' if filename else ''}."
            ) from error
        # An empty object whose name ends in a slash is how some tools write a folder.
        return {path: info for path, info in found.items() if not path.endswith("/")}

    def _check_names(self, files: Collection[str]) -> None:
        for path in files:
            try:
                path.encode()
            except UnicodeEncodeError as error:
                raise SourceError(
                    f"Source {self.uri} holds a file whose name is no UTF-8, {os.fsencode(path)!r}:"
                    " rename it, for instance with convmv."
                ) from error

    def _item(
        self,
        path: str,
        name: str,
        info: Mapping[str, Any],
        sidecars: Mapping[str, Sequence[str]],
    ) -> Item:
        stem = posixpath.splitext(path)[0]
        beside = [*sidecars.get(stem, []), *sidecars.get(path, [])]
        version = next((info[name] for name in VERSION_FIELDS if name in info), "")
        return Item(
            key=name.removeprefix(self._root.rstrip("/") + "/"),
            uri=self._address(path),
            size=int(info.get("size") or 0),
            version=str(version).strip('"'),
            sidecars=tuple(self._address(other) for other in beside),
        )

    def _address(self, path: str) -> str:
        """The path with its protocol; local paths stay plain."""
        if isinstance(self._fs, LocalFileSystem):
            return path
        return str(self._fs.unstrip_protocol(path))


def _walk(root: str) -> dict[str, dict[str, Any]]:
    """Find local files, through links to folders too. Raises OSError where it may not look."""
    found: dict[str, dict[str, Any]] = {}
    seen: set[str] = set()

    def refuse(error: OSError) -> None:
        raise error

    for folder, folders, files in os.walk(root, onerror=refuse, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:  # a link to a folder above: its files are listed already
            folders.clear()
            continue
        seen.add(real)
        folders.sort()  # of two ways to one folder always the same is taken
        for name in files:
            path = f"{folder.rstrip('/')}/{name}"
            try:
                status = Path(path).stat()
                found[path] = {"size": status.st_size, "mtime": status.st_mtime_ns}
            except OSError as error:
                if error.errno not in (errno.ENOENT, errno.ELOOP):
                    raise
                found[path] = {"size": 0}  # a link to nowhere: an item that will fail by name
    return found


def _names(paths: Sequence[str]) -> dict[str, str]:
    """The name of each path: without its extension, except where that would not be unique."""
    names = {path: posixpath.splitext(path)[0] for path in paths}
    while True:
        uses = Counter(names.values())
        clashing = [path for path, name in names.items() if uses[name] > 1 and name != path]
        if not clashing:
            return names
        names.update({path: path for path in clashing})
