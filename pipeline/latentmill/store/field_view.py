"""The field of a view: the values of its records in the fields of its bases."""

from __future__ import annotations

import contextlib
import warnings
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa

from latentmill.errors import FieldBehindWarning, StorageError, StoreError
from latentmill.storage.storage import Storage
from latentmill.store.bases import Bases, inside_base, split_path
from latentmill.store.entries import BaseEntry
from latentmill.store.field_layout import (
    FIELDS,
    existing_field,
    field_names,
    warn_if_behind,
)
from latentmill.store.fields import ShardFields
from latentmill.store.index import Index
from latentmill.store.prefetch import PrefetchedRanges
from latentmill.store.store import LatentStore
from latentmill.text.log import get_logger
from latentmill.text.printing import counted

_log = get_logger("store")


class FieldOfView(LatentStore):
    """A field of a view, read like a view of the fields of its bases.

    Its records are those of the view that have a value: `len` counts them. `info`, `origin` and the
    statistics are those of the first base's field, with its own counts.

    Args:
        view: The view.
        name: The name of the field.
        device: As for `LatentStore`.

    Raises:
        StoreError: No base has the field, or the fields of two bases were computed with other
            settings.
    """

    def __init__(self, view: LatentStore, name: str, *, device: str = "auto") -> None:
        self._view, self.name = view, name
        numbered = _fields(view, name, device)
        self._numbers = [number for number, _ in numbered]
        self._stores = [store for _, store in numbered]
        super().__init__(self._stores[0].url, device=device)
        entries = view.info.bases
        own = [
            BaseEntry(
                url=store.url,
                fingerprint=self._stores[0].info.fingerprint,
                index_hash=store.info.index_hash,
                prefix=entries[number].prefix,
                records=store.info.encoded,
            )
            for number, store in numbered
        ]
        self.bases = Bases(Storage(view.url), own)
        self.storage = self.bases.over(self.storage)  # origin.npy is that of the first field
        self._shard_fields = ShardFields(self.storage)
        self.ranges = PrefetchedRanges(self.storage)
        first = self.info
        self._info = first.model_copy(update={"bases": own, "metadata": None, "annotation": None})

    def __getstate__(self) -> dict[str, Any]:
        return {"view": self._view, "name": self.name, "device": self._device}

    def warn_if_behind(self) -> None:
        """Warn of each field that may be out of date, or has other texts than the view."""
        assert self._view.bases is not None
        for number, store in zip(self._numbers, self._stores, strict=True):
            info = self._view.bases.infos[number]
            warn_if_behind(self._view.info.bases[number].url, info, store)
            with contextlib.suppress(StoreError, StorageError):  # the field can be read without
                self._warn_of_texts(number, store)

    def _warn_of_texts(self, number: int, field: LatentStore) -> None:
        """Warn if texts were annotated on the view, and the field has those of its base.

        Reads metadata only if a name that the field was computed from was annotated on the view.
        """
        entry, own = field.info.field, self._view.info.annotation
        if entry is None or own is None or len(own.refreshed) == own.version:
            return
        name = entry.source.removeprefix("metadata:")
        if name == entry.source or name not in own.names:
            return
        base = self._view.info.bases[number]
        store = LatentStore(base.url)
        annotated = store.info.annotation
        if not own.refreshed and annotated is not None and name in annotated.names:
            return  # a view of an earlier version does not tell whose values it has
        ours, theirs = (_values_of(one, name) for one in (self._view, store))
        if ours is None or theirs is None:
            return
        keys = self._keys_in(number).to_pylist()
        other = sum(ours.get(key) != theirs.get(key.removeprefix(base.prefix)) for key in keys)
        if other:
            warnings.warn(
                f"field {entry.name!r} was computed from the values of {name!r} in {base.url}, but "
                f"{self._view.url} has other values for {counted(other, 'record')}: to use those "
                f"of the view, annotate {base.url} with them and rerun the `latentmill add` "
                "command of the field; to use those of the store, write the view again with "
                "--overwrite.",
                FieldBehindWarning,
                stacklevel=2,
            )

    def path_in_view(self, path: str) -> str:
        """A path of this store's index as the storage of the view has it."""
        number, inside = split_path(path)
        return f"bases/{self._numbers[number]}/{FIELDS}/{self.name}/{inside}"

    @cached_property
    def index(self) -> Index:
        """The location of the value of every record of the view that has one."""
        import pyarrow.compute as pc  # slow, and most commands do not need it

        assert self.bases is not None
        tables = []
        for own, (number, store) in enumerate(zip(self._numbers, self._stores, strict=True)):
            prefix = self._view.info.bases[number].prefix
            rows = inside_base(store.index.table, own, prefix)
            self.bases.use_seal(own, store.info)  # of this index, which may be a later one
            tables.append(rows.filter(pc.is_in(rows["key"], self._keys_in(number))))
        return Index.from_tables(tables)

    def _keys_in(self, number: int) -> pa.ChunkedArray:
        """The keys of the view's records that are in one base."""
        view = self._view.index
        base_of = np.array([split_path(path)[0] for path in view.shards], np.int64)
        of_row = base_of[view.column("shard")] if len(view) else base_of
        return view.table["key"].take(pa.array(np.flatnonzero(of_row == number)))

    def reload(self) -> bool:
        """Read the seals of the view and of the fields again; see `LatentStore.reload`."""
        with self._reloading:
            changed = [store.reload() for store in (self._view, *self._stores)]
            if any(changed):
                # Opened first: other threads read meanwhile, and opening may fail.
                now = FieldOfView(self._view, self.name, device=self._device)
                kept = ("_reloading", "_loading", "_model")
                self.__dict__.update({k: v for k, v in vars(now).items() if k not in kept})
                for name in self.__dict__.keys() - vars(now).keys():  # such as the index
                    self.__dict__.pop(name, None)
            return any(changed)


def _fields(view: LatentStore, name: str, device: str) -> list[tuple[int, LatentStore]]:
    """The field of each base of a view that has one, with the number of the base."""
    assert view.bases is not None
    found: list[tuple[int, LatentStore]] = []
    missing: StoreError | None = None
    for number, storage in enumerate(view.bases.storages):
        try:
            url = existing_field(storage, name)
        except StoreError as error:
            missing = missing or error
            continue
        store = LatentStore(url, device=device)
        if not store.sealed:
            raise StoreError(f"{url} is not complete: run the same `latentmill add` again.")
        found.append((number, store))
    if not found:
        raise missing or StoreError(f"The view {view.url} has no bases: create it again.")
    first = found[0][1]
    for _, store in found:
        if store.info.fingerprint != first.info.fingerprint:
            raise StoreError(
                f"{first.url} and {store.url} were computed with other settings, so the view "
                f"{view.url} cannot be read with this field: add both with the same command."
            )
    return found


def _values_of(store: LatentStore, name: str) -> dict[str, Any] | None:
    """The values of a name in the records' own metadata, by key; None if it has no column."""
    from latentmill.store.metadata import PREFIX  # slow, and most readers do not need it
    from latentmill.store.metadata_file import open_metadata

    column, file = PREFIX + name, open_metadata(store)
    if file is None or column not in file.schema_arrow.names:
        return None
    table = file.read(columns=["key", column], use_threads=False)
    return dict(zip(*(values.to_pylist() for values in table.columns), strict=True))


def names_of_fields(store: LatentStore) -> list[str]:
    """Names of a store's fields; lists its folder `fields/`. Of a view, those of all its bases."""
    names = _names_of_fields(store)
    return sorted(set.intersection(*names)) if names else []


def _names_of_fields(store: LatentStore) -> list[set[str]]:
    """The names of the fields of a store, or of each base of a view."""
    storages = [store.storage] if store.bases is None else store.bases.storages
    return [set(field_names(storage)) for storage in storages]


def open_field(store: LatentStore, name: str, device: str) -> LatentStore:
    """Open a field of a store or of a view; see `FieldOfView` for errors."""
    if store.bases is None:
        return LatentStore(existing_field(store.storage, name), device=device)
    return FieldOfView(store, name, device=device)


def warn_of_fields(store: LatentStore, command: str) -> None:
    """Log which fields of a store, or of any base of a view, a command leaves out."""
    with contextlib.suppress(StorageError):  # a reader may be allowed to read files but not folders
        if names := sorted(set().union(*_names_of_fields(store))):
            _log.warning(
                "%s: %s does not include its fields: %s", store.url, command, ", ".join(names)
            )


def warn_of_state(store: LatentStore, field: LatentStore) -> None:
    """Warn if a field of a store or of a view may be out of date."""
    if isinstance(field, FieldOfView):
        field.warn_if_behind()
    else:
        warn_if_behind(store.url, store.info if store.sealed else None, field)
