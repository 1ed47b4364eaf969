"""A folder or bucket of audio files, with sidecar files that become metadata."""

from __future__ import annotations

import errno
import fnmatch
import os
import posixpath
import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from latentmill.errors import SourceError
from latentmill.remote import retrying
from latentmill.sources.base import Item
from latentmill.sources.files import Place, version_of
from latentmill.sources.names import dotted, without_extensions

SIDECARS = (".json", ".txt")
_OTHERS = {".parquet": "parquet", ".tar": "webdataset"}  # sources of another type, by extension

_Entries = Mapping[str, Mapping[str, Any]]  # the files of one folder, by path


class FolderSource:
    """Every audio file below a folder, which may be any fsspec URL.

    A key is the file's path relative to the folder without its extension; where several audio
    files share that, all of them keep their extensions. `song.json` and `song.txt` beside
    `song.wav` are its sidecars, and `song.wav.json` too. `include` and `exclude` are globs over
    relative paths with their extensions; a `*` takes slashes too.
    """

    def __init__(
        self,
        uri: str,
        extensions: Collection[str],
        *,
        include: Sequence[str] = (),
        exclude: Sequence[str] = (),
    ) -> None:
        self._extensions = frozenset(dotted(tuple(extensions)))
        self._include, self._exclude = _globs(include), _globs(exclude)
        self._place = Place(uri)
        self.uri = self._place.uri
        self.ignored: Counter[str] = Counter()

    def items(self) -> Iterator[Item]:
        """List the items, folder by folder; see `Source.items`."""
        self.ignored.clear()
        seen = found = 0
        with self._place.errors():
            kind = self._place.kind()
            if kind == "file":
                raise SourceError(f"Source {self.uri} is a file: name the folder that holds it.")
            if kind == "nothing":
                raise SourceError(f"Source {self.uri} does not exist: check the path.")
            for files in self._folders():
                seen += len(files)
                for item in self._items_of(files):
                    found += 1
                    yield item
        if not found:
            raise SourceError(self._nothing(seen))

    def _items_of(self, files: _Entries) -> Iterator[Item]:
        """The items of one folder. Names clash and sidecars belong inside a folder only."""
        self._check_names(files)
        audio: list[str] = []
        sidecars: dict[str, list[str]] = defaultdict(list)
        for path in sorted(files):
            stem, extension = posixpath.splitext(path)
            if extension.lower() in self._extensions:
                audio.append(path)
            elif extension.lower() in SIDECARS:
                sidecars[stem].append(path)
            else:
                self.ignored[extension.lower() or "no extension"] += 1
        owners = {*audio, *(posixpath.splitext(path)[0] for path in audio)}
        for stem, orphans in sidecars.items():
            if stem not in owners:
                self.ignored.update(posixpath.splitext(path)[1].lower() for path in orphans)
        names = without_extensions(audio)  # of all, so that a filter does not rename the others
        for path in audio:
            if self._wanted(path):
                yield self._item(path, names[path], files[path], sidecars)
            else:
                self.ignored["excluded"] += 1

    def _wanted(self, path: str) -> bool:
        name = self._relative(path)
        included = self._include is None or self._include.fullmatch(name)
        return bool(included) and not (self._exclude and self._exclude.fullmatch(name))

    def _folders(self) -> Iterator[_Entries]:
        """The files below the folder with sizes and versions, each folder's at once."""
        place = self._place
        if place.local:
            yield from _walk(place.path)
            return
        entries = retrying(lambda: place.fs.ls(place.path, detail=True))
        folders = [e["name"].rstrip("/") for e in entries if e["type"] == "directory"]
        if place.path in folders:  # an object store's name with two slashes: no tree to walk
            yield from _by_folder(retrying(lambda: place.fs.find(place.path, detail=True)))
            return
        yield from _by_folder({e["name"]: e for e in entries if e["type"] == "file"})
        for folder in sorted(set(folders)):
            found = retrying(lambda f=folder: place.fs.find(f, detail=True))  # type: ignore[misc]
            yield from _by_folder(found)
            place.fs.invalidate_cache()  # of one folder at a time there is enough memory

    def _check_names(self, files: Collection[str]) -> None:
        for path in files:
            try:
                path.encode()
            except UnicodeEncodeError as error:
                raise SourceError(
                    f"Source {self.uri} holds a file whose name is no UTF-8, {os.fsencode(path)!r}:"
                    " rename it, for instance with convmv."
                ) from error

    def _relative(self, path: str) -> str:
        return path.removeprefix(self._place.path.rstrip("/") + "/")

    def _item(
        self,
        path: str,
        name: str,
        info: Mapping[str, Any],
        sidecars: Mapping[str, Sequence[str]],
    ) -> Item:
        stem = posixpath.splitext(path)[0]
        beside = [*sidecars.get(stem, []), *sidecars.get(path, [])]
        return Item(
            key=self._relative(name),
            uri=self._place.address(path),
            size=int(info.get("size") or 0),
            version=version_of(info),
            sidecars=tuple(self._place.address(other) for other in beside),
        )

    def _nothing(self, seen: int) -> str:
        excluded = self.ignored["excluded"]
        if excluded:
            return (
                f"Source {self.uri} holds {excluded} audio files, and the globs exclude them all."
            )
        text = (
            f"Source {self.uri} holds no audio files: looked for "
            f"{', '.join(sorted(self._extensions))} in {seen} files"
        )
        for extension, kind in _OTHERS.items():
            if self.ignored[extension]:
                return f"{text}, of which --source-type {kind} reads {self.ignored[extension]}."
        return f"{text}."


def _globs(patterns: Sequence[str]) -> re.Pattern[str] | None:
    if not patterns:
        return None
    return re.compile("|".join(fnmatch.translate(pattern) for pattern in patterns))


def _by_folder(files: _Entries) -> Iterator[_Entries]:
    folders: dict[str, dict[str, Mapping[str, Any]]] = defaultdict(dict)
    for path, info in files.items():
        # An empty object whose name ends in a slash is how some tools write a folder.
        if not path.endswith("/"):
            folders[posixpath.dirname(path)][path] = info
    yield from folders.values()


def _walk(root: str) -> Iterator[_Entries]:
    """Find local files, through links to folders too. Raises OSError where it may not look."""
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
        found: dict[str, dict[str, Any]] = {}
        for name in files:
            path = f"{folder.rstrip('/')}/{name}"
            try:
                status = Path(path).stat()
                found[path] = {"size": status.st_size, "mtime": status.st_mtime_ns}
            except OSError as error:
                if error.errno not in (errno.ENOENT, errno.ELOOP):
                    raise
                found[path] = {"size": 0}  # a link to nowhere: an item that will fail by name
        yield found
