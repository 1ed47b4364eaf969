"""A folder or bucket of audio files; sidecar files beside them are metadata."""

from __future__ import annotations

import fnmatch
import posixpath
import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence

from latentmill.errors import SourceError
from latentmill.sources.base import Item
from latentmill.sources.files import Place, check_name
from latentmill.sources.listing import Entries, folders
from latentmill.sources.names import APPLE_DOUBLE, dotted, is_apple_double, without_extensions
from latentmill.storage.remote import is_web

SIDECARS = (".json", ".txt")
_OTHERS = {".parquet": "parquet", ".tar": "webdataset"}  # other types of source


class FolderSource:
    """The audio files of a folder and its subfolders; any fsspec URL.

    A key is the file's path relative to the folder, without its extension. Audio files whose paths
    differ only in the extension keep it. `song.json`, `song.txt` and `song.wav.json` beside
    `song.wav` are its sidecars. `include` and `exclude` are globs of relative paths with their
    extensions; `*` also matches slashes.
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
        """Yield the items, folder by folder; see `Source.items`."""
        self.ignored.clear()
        seen = found = 0
        with self._place.errors():
            kind = self._place.kind()
            if kind == "file" and is_web(self.uri):
                raise SourceError(
                    f"Source {self.uri} cannot be listed because web servers do not list folders: "
                    "list its files in a manifest."
                )
            if kind == "file":
                raise SourceError(f"Source {self.uri} is a file: use its folder.")
            if kind == "nothing":
                raise SourceError(f"Source {self.uri} does not exist: check the path.")
            for files in folders(self._place, self.ignored):
                seen += len(files)
                for item in self._items_of(files):
                    found += 1
                    yield item
        if not found:
            raise SourceError(self._without_items(seen))

    def _items_of(self, files: Entries) -> Iterator[Item]:
        """The items of one folder."""
        for path in files:
            check_name(self.uri, path)
        audio: list[str] = []
        sidecars: dict[str, list[str]] = defaultdict(list)
        for path in sorted(files):
            stem, extension = posixpath.splitext(path)
            if is_apple_double(self._relative(path)):
                self.ignored[APPLE_DOUBLE] += 1
            elif extension.lower() in self._extensions:
                audio.append(path)
            elif extension.lower() in SIDECARS:
                sidecars[stem].append(path)
            else:
                self.ignored[extension.lower() or "no extension"] += 1
        owners = {*audio, *(posixpath.splitext(path)[0] for path in audio)}
        for stem, orphans in sidecars.items():
            if stem not in owners:
                self.ignored.update(posixpath.splitext(path)[1].lower() for path in orphans)
        names = without_extensions(audio)  # before filtering, so that filters do not change keys
        for path in audio:
            name = self._relative(path)
            included = self._include is None or self._include.fullmatch(name)
            if included and not (self._exclude and self._exclude.fullmatch(name)):
                yield self._item(path, names[path], files, sidecars)
            else:
                self.ignored["excluded"] += 1

    def _relative(self, path: str) -> str:
        return path.removeprefix(self._place.path.rstrip("/") + "/")

    def _item(
        self, path: str, name: str, files: Entries, sidecars: Mapping[str, Sequence[str]]
    ) -> Item:
        stem = posixpath.splitext(path)[0]
        beside = [*sidecars.get(stem, []), *sidecars.get(path, [])]
        return Item(
            key=self._relative(name),
            uri=self._place.address(path),
            size=files[path].size,
            version=files[path].version,
            sidecars=tuple(self._place.address(other) for other in beside),
            sidecar_versions=" ".join(files[other].version for other in beside),
        )

    def _without_items(self, seen: int) -> str:
        excluded = self.ignored["excluded"]
        if excluded:
            return (
                f"Source {self.uri} contains {excluded} audio files, but --include and --exclude "
                "skip all of them: change these patterns."
            )
        if not seen:
            return f"Source {self.uri} is empty: check the path."
        text = (
            f"Source {self.uri} contains no audio files: none of its {seen} files ends in "
            f"{', '.join(sorted(self._extensions))}"
        )
        for extension, kind in _OTHERS.items():
            if self.ignored[extension]:
                return f"{text}; use --source-type {kind} for {self.ignored[extension]} of them."
        return f"{text}; check the path or set --extensions."


def _globs(patterns: Sequence[str]) -> re.Pattern[str] | None:
    if not patterns:
        return None
    return re.compile("|".join(fnmatch.translate(pattern) for pattern in patterns))
