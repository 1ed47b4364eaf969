"""The base stores of a view: the stores whose shards have the view's records.

A view is a sealed store without shards. Its index lists records in the shards of other stores, as
`bases/N/shards/...`, where N is the number of the base in dataset.json. A record is identified by
its key and the hash of its latent; its position in the index is correct as long as the base has
the same index as when the view was written, and is found again in the base's index otherwise.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import urlsplit

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from latentmill.errors import StorageError, StoreError
from latentmill.storage.remote import is_web, protocol_of, was_removed
from latentmill.storage.storage import Storage
from latentmill.store.entries import BaseEntry
from latentmill.store.index import INDEX_SCHEMA, Index, damaged_index, open_index
from latentmill.store.schema import DatasetInfo
from latentmill.store.seal import read_seal

BASES = "bases"
PROTOCOLS = ("s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "hf", "http", "https", "memory")
_INSIDE = re.compile(r"bases/(\d{1,6})/(.+)")


class Bases:
    """The base stores of one view, and their seals as last read."""

    def __init__(self, view: Storage, entries: Sequence[BaseEntry]) -> None:
        self.entries = entries
        self._view = view.root
        self._storages = [self._open(view, entry) for entry in entries]
        self.storage = self.over(view)
        self.infos = [self._seal(number) for number in range(len(entries))]

    def over(self, view: Storage) -> ViewStorage:
        """The folder of the view together with the bases' shards."""
        return ViewStorage(view, self._storages, [entry.prefix for entry in self.entries])

    def _open(self, view: Storage, entry: BaseEntry) -> Storage:
        """Open a base. dataset.json must not make a reader send requests to any other server."""
        fault = fault_of_base(view, entry.url)
        if fault == "is not valid":
            raise StoreError(
                f"The view {self._view} has an invalid base store, {entry.url!r}: create it again."
            )
        if fault is not None:
            remedy = (
                "create the view from stores in a bucket"
                if fault == "is a local path"
                else "copy the view to a disk if you trust it, and open it there"
            )
            raise StoreError(
                f"The view {self._view} is remote, but its base store {entry.url} {fault}: "
                f"{remedy}."
            )
        return Storage(entry.url)

    def _seal(self, number: int) -> DatasetInfo:
        entry, info = self.entries[number], read_seal(self._storages[number])
        what = None
        if info is None:
            what = "is missing or not complete"
        elif info.bases:
            what = "is a view"
        elif info.fingerprint != entry.fingerprint:
            what = "was encoded again with other settings"
        if info is None or what:
            raise StoreError(
                f"{entry.url}, a base store of the view {self._view}, {what}: restore it, or "
                "create the view again."
            )
        return info

    def reload(self) -> bool:
        """Read the seals of the bases again; returns whether one has changed."""
        found = [self._seal(number) for number in range(len(self.entries))]
        changed = found != self.infos
        self.infos = found
        self.__dict__.pop("shard_sizes", None)
        return changed

    def use_seal(self, number: int, info: DatasetInfo) -> None:
        """Use a later seal of one base."""
        self.infos[number] = info
        self.__dict__.pop("shard_sizes", None)

    @cached_property
    def shard_sizes(self) -> dict[str, tuple[int, str]]:
        """The size in bytes and the hash of every shard of the bases, by path in the view."""
        return {
            f"{BASES}/{number}/{shard.path}": (shard.bytes, shard.hash)
            for number, info in enumerate(self.infos)
            for shard in info.shards
        }

    @property
    def storages(self) -> Sequence[Storage]:
        """The bases, by number."""
        return self._storages

    @property
    def first(self) -> Storage:
        """The first base. All were encoded with the same settings, which its plan has."""
        return self._storages[0]

    def current(self, index: Index) -> Index:
        """The view's index, with the positions that the records have in the bases now.

        Raises StoreError if a base no longer has a record, or has another latent for it.
        """
        bases = np.array([split_path(path)[0] for path in index.shards], np.int64)
        if len(bases) and bases.max() >= len(self.entries):
            raise StoreError(f"The index of {self._view} is damaged: create the view again.")
        of_row = bases[index.column("shard")] if len(index) else bases
        seals = zip(self.entries, self.infos, strict=True)
        changed = [
            n for n, (entry, info) in enumerate(seals) if entry.index_hash != info.index_hash
        ]
        changed = [number for number in changed if (of_row == number).any()]
        if not changed:
            return index
        kept = np.flatnonzero(~np.isin(of_row, changed))
        tables = [index.table.take(pa.array(kept))]
        tables += [
            self._found(index, number, np.flatnonzero(of_row == number)) for number in changed
        ]
        return Index.from_tables(tables)

    def _found(self, index: Index, number: int, rows: npt.NDArray[np.int64]) -> pa.Table:
        """The index rows of a changed base for some records of the view."""
        import pyarrow.compute as pc  # slow, and most commands do not need it

        entry, base = self.entries[number], self._index(number)
        wanted = index.table.take(pa.array(rows))
        keys = pc.utf8_slice_codeunits(wanted["key"], len(entry.prefix))
        places = pc.index_in(keys, base.table["key"]) if len(base) else pa.nulls(len(rows))
        missing = np.asarray(pc.is_null(places))
        found = base.table.take(pc.fill_null(places, 0)) if len(base) else wanted
        other = missing | (np.asarray(found["hash"]) != np.asarray(wanted["hash"]))
        if other.any():
            example = keys[int(np.argmax(other))]
            raise StoreError(
                f"{entry.url}, a base store of the view {self._view}, no longer has the latents of "
                f"{int(other.sum())} of its records, such as {example}: restore the base, or "
                "create the view again."
            )
        return inside_base(found, number, entry.prefix)

    def _index(self, number: int) -> Index:
        """The index of a base, or that of the seal that has replaced it meanwhile."""
        storage, info = self._storages[number], self.infos[number]
        try:
            return open_index(storage, info.index, info.index_hash)
        except (FileNotFoundError, StorageError) as error:
            if not was_removed(error.__cause__ or error):
                raise
            now = self._seal(number)
            if now == info:
                raise damaged_index(f"{storage.root}/{info.index}") from error
        self.use_seal(number, now)
        return self._index(number)


def fault_of_base(view: Storage, url: str) -> str | None:
    """Why a view cannot have the base store `url`; None if it can."""
    protocol, local = protocol_of(url), "://" not in url
    known = Path(url).is_absolute() if local else protocol in PROTOCOLS
    if not known or "\0" in url:
        return "is not valid"
    if view.local:
        return None
    if local:
        return "is a local path"
    same = protocol == protocol_of(view.root)
    if is_web(url):
        same = same and urlsplit(url).netloc == urlsplit(view.root).netloc
    return None if same else "is on another server"


def needs_copy(view: str) -> StoreError:
    """The error for a view where a store with shards of its own is needed."""
    return StoreError(
        f"{view} is a view, which has no latents of its own: make a store of it with `latentmill "
        f"select {view} NEW --copy`, and use that."
    )


def inside_base(table: pa.Table, number: int, prefix: str) -> pa.Table:
    """Index rows of a base as those of a view."""
    return renamed(table, prefix, lambda path: f"{BASES}/{number}/{path}")


def renamed(table: pa.Table, prefix: str, rename: Callable[[str], str]) -> pa.Table:
    """Index rows with a prefix before the keys, and other names of the shards."""
    import pyarrow.compute as pc

    shards = table["shard"].combine_chunks()
    if isinstance(shards, pa.ChunkedArray):
        shards = shards.chunk(0) if shards.num_chunks else pa.array([], table.schema[1].type)
    paths = pa.array([rename(path) for path in shards.dictionary.to_pylist()], pa.string())
    keys = pc.binary_join_element_wise(prefix, table["key"], "") if prefix else table["key"]
    changed = table.set_column(0, "key", keys).set_column(
        1, "shard", pa.DictionaryArray.from_arrays(shards.indices, paths)
    )
    return changed.cast(INDEX_SCHEMA)


def split_path(path: str) -> tuple[int, str]:
    """The number of the base of a path in a view, and the path in the base.

    Raises StoreError if the path is not that of a base.
    """
    found = _INSIDE.fullmatch(path)
    if found is None:
        raise StoreError(
            f"The index of a view has the path {path!r}, which is not in a base: create the view "
            "again."
        )
    return int(found[1]), found[2]


class ViewStorage(Storage):
    """The folder of a view, in which the shards of its bases have paths `bases/N/...`."""

    def __init__(self, own: Storage, bases: Sequence[Storage], prefixes: Sequence[str]) -> None:
        self._own, self._bases, self._prefixes = own, bases, prefixes
        self.root = own.root
        self.local = all(one.local for one in (own, *bases))

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return ViewStorage, (self._own, self._bases, self._prefixes)

    def _at(self, path: str) -> tuple[Storage, str]:
        found = _INSIDE.fullmatch(path)
        if found is None or int(found[1]) >= len(self._bases):
            return self._own, path
        return self._bases[int(found[1])], found[2]

    def full(self, path: str) -> str:
        storage, inside = self._at(path)
        return storage.full(inside)

    def named(self, path: str) -> str:
        storage, inside = self._at(path)
        return storage.named(inside)

    def key_prefix(self, path: str) -> str:
        found = _INSIDE.fullmatch(path)
        return "" if found is None else self._prefixes[int(found[1])]

    def list(self, folder: str) -> dict[str, int]:
        storage, inside = self._at(folder)
        return storage.list(inside)

    def read(self, path: str) -> bytes:
        storage, inside = self._at(path)
        return storage.read(inside)

    def read_if_exists(self, path: str) -> bytes | None:
        storage, inside = self._at(path)
        return storage.read_if_exists(inside)

    def read_range(self, path: str, offset: int, length: int) -> bytes:
        storage, inside = self._at(path)
        return storage.read_range(inside, offset, length)

    def read_ranges(self, ranges: Sequence[tuple[str, int, int]]) -> Sequence[bytes]:
        places = [self._at(path) for path, _, _ in ranges]
        found = [b""] * len(ranges)
        for storage in {id(one): one for one, _ in places}.values():
            rows = [row for row, (one, _) in enumerate(places) if one is storage]
            wanted = [(places[row][1], *ranges[row][1:]) for row in rows]
            for row, data in zip(rows, storage.read_ranges(wanted), strict=True):
                found[row] = data
        return found

    @contextlib.contextmanager
    def open(self, path: str) -> Iterator[BinaryIO]:
        storage, inside = self._at(path)
        with storage.open(inside) as file:
            yield file

    def version(self, path: str) -> str | None:
        storage, inside = self._at(path)
        return storage.version(inside)

    def write(self, path: str, data: bytes) -> None:
        self._own.write(path, data)

    def create(self, path: str, data: bytes) -> bool:
        return self._own.create(path, data)

    def replace(self, path: str, data: bytes, version: str | None) -> bool:
        return self._own.replace(path, data, version)

    def publish(
        self, temporary: Path, path: str, on_bytes: Callable[[], object] = lambda: None
    ) -> bool:
        return self._own.publish(temporary, path, on_bytes)

    def delete(self, path: str) -> None:
        self._own.delete(path)

    @contextlib.contextmanager
    def scratch_file(self, path: str) -> Iterator[Path]:
        with self._own.scratch_file(path) as file:
            yield file

    @property
    def scratch_folder(self) -> Path:
        return self._own.scratch_folder

    def clear_scratch(self) -> None:
        self._own.clear_scratch()
