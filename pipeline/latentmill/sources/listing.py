"""Lists the files of a folder and its subfolders, on a disk or any object storage.

The files of one folder come together, because sidecars belong to the audio beside them. Only a few
folders are in memory at a time, even for a bucket with a million files.
"""

from __future__ import annotations

import errno
import os
import posixpath
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from latentmill.sources.files import Place, version_of
from latentmill.storage.object_listing import has_pages, objects_below
from latentmill.storage.remote import retrying


@dataclass(frozen=True, slots=True)
class Entry:
    """A listed file: its bytes, and a value that changes when the file changes."""

    size: int
    version: str = ""


Entries: TypeAlias = Mapping[str, Entry]  # the files of one folder, by path


def folders(place: Place, ignored: Counter[str]) -> Iterator[Entries]:
    """Yield the files of each folder below a folder; links to listed folders are counted.

    Raises OSError and other `storage_errors`.
    """
    if place.local:
        yield from _walk(place.path, ignored)
    elif has_pages(place.fs, place.path):
        found = objects_below(place.fs, place.path)
        yield from by_folder((one.path, Entry(one.size, one.version)) for one in found)
    else:
        yield from _tree(place)


def by_folder(files: Iterable[tuple[str, Entry]]) -> Iterator[Entries]:
    """Group files by folder; they must come in the order of the UTF-8 bytes of their paths."""
    open_folders: list[tuple[str, dict[str, Entry]]] = []
    for path, entry in files:
        folder = posixpath.dirname(path)
        while open_folders and not f"{folder}/".startswith(f"{open_folders[-1][0]}/"):
            yield open_folders.pop()[1]
        if not open_folders or open_folders[-1][0] != folder:
            open_folders.append((folder, {}))
        open_folders[-1][1][path] = entry
    while open_folders:
        yield open_folders.pop()[1]


def _tree(place: Place) -> Iterator[Entries]:
    """Other storage: list each folder of the first level with all of its subfolders."""
    entries = retrying(lambda: place.fs.ls(place.path, detail=True))
    names = [e["name"].rstrip("/") for e in entries if e["type"] == "directory"]
    if place.path in names:  # a name with two slashes on an object storage
        yield from _grouped(retrying(lambda: place.fs.find(place.path, detail=True)))
        return
    yield from _grouped({e["name"]: e for e in entries if e["type"] == "file"})
    for name in sorted(set(names)):
        yield from _grouped(retrying(lambda f=name: place.fs.find(f, detail=True)))  # type: ignore[misc]
        place.fs.invalidate_cache()  # keeps only one folder in memory


def _grouped(files: Mapping[str, Mapping[str, Any]]) -> Iterator[Entries]:
    found: dict[str, dict[str, Entry]] = defaultdict(dict)
    for path, info in files.items():
        if not path.endswith("/"):  # a marker of a folder, see `client_listing`
            found[posixpath.dirname(path)][path] = _entry(info)
    yield from found.values()


def _entry(info: Mapping[str, Any]) -> Entry:
    return Entry(int(info.get("size") or 0), version_of(info))


def _walk(root: str, ignored: Counter[str]) -> Iterator[Entries]:
    """List local files, also those in linked folders. Raises OSError if a folder is unreadable."""
    seen: set[str] = set()

    def refuse(error: OSError) -> None:
        raise error

    for folder, inner, files in os.walk(root, onerror=refuse, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:  # a link, perhaps to a parent folder
            ignored["links to folders that are listed already"] += 1
            inner.clear()
            continue
        seen.add(real)
        inner.sort()  # of two paths to a folder, always use the same one
        found: dict[str, Entry] = {}
        for name in files:
            path = f"{folder.rstrip('/')}/{name}"
            try:
                status = Path(path).stat()
                found[path] = Entry(status.st_size, str(status.st_mtime_ns))
            except OSError as error:
                if error.errno not in (errno.ENOENT, errno.ELOOP):
                    raise
                found[path] = Entry(0)  # a dangling link: an item that will fail
        yield found
