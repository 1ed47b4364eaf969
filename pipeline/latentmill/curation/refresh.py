"""Brings changed sidecars and manifest columns into a store, as a version of its annotations.

Nothing is encoded again. The plan gets the new rows last, so a run that was killed before finds the
same items again. A value that `annotate` has set stays; a value that an earlier refresh has set is
replaced, because the files of that version and of the one before show who has set it. If one of
these was deleted, the value stays.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from latentmill.curation.annotate import MAX_LISTED, publish
from latentmill.curation.annotation_table import EMPTY, MAX_NAMES, STORED, merged, table_of
from latentmill.errors import ItemError
from latentmill.plan import Plan
from latentmill.plan.amend import amend
from latentmill.plan.compare import Comparison
from latentmill.plan.items import to_items
from latentmill.sources.base import Item
from latentmill.sources.metadata import read_metadata
from latentmill.storage.storage import Storage
from latentmill.store.annotations import Annotations, is_column, refreshed_versions
from latentmill.store.commit import read_commit
from latentmill.store.metadata_file import metadata_of
from latentmill.store.schema import DatasetInfo
from latentmill.store.store import LatentStore

_READERS = 16  # sidecars read at the same time
_ROWS = 16_384  # of the metadata file in memory at a time
_DESCRIPTION = ("sidecars", "metadata", "sidecar_versions")  # columns of the plan


@dataclass(frozen=True)
class RefreshSummary:
    """What `--refresh-metadata` changed in a store.

    Attributes:
        records: Number of records with new values.
        values: Number of new values.
        version: Version of the annotations with these values; 0 if nothing changed.
        kept: Number of values that stay because `annotate` has set them.
        removed: Number of values that the source no longer has; they stay in the store.
        ignored: Names that cannot be annotated, such as those of stored fields.
        unreadable: Number of items whose metadata could not be read.
        reasons: (key, reason) of the first of them.
    """

    records: int = 0
    values: int = 0
    version: int = 0
    kept: int = 0
    removed: int = 0
    ignored: tuple[str, ...] = ()
    unreadable: int = 0
    reasons: tuple[tuple[str, str], ...] = ()


@dataclass
class _Found:
    """New values by key and name, and the counts of a `RefreshSummary`."""

    values: dict[str, dict[str, Any]] = field(default_factory=dict)
    names: Counter[str] = field(default_factory=Counter)
    kept: int = 0
    removed: int = 0

    def compare(
        self, key: str, old: Mapping[str, Any], new: Mapping[str, Any], own: frozenset[str]
    ) -> None:
        """Note what has changed; `own` are the names that `annotate` has set."""
        changed = {name: v for name, v in new.items() if v is not None and old.get(name) != v}
        self.kept += len(changed.keys() & own)
        self.removed += len(old.keys() - new.keys() - own)
        for name in own:
            changed.pop(name, None)
        if changed:
            self.values[key] = changed
            self.names.update(changed.keys())


def without_outdated(
    storage: Storage, sealed: DatasetInfo, revisions: Mapping[str, int]
) -> pa.Table | None:
    """The annotations of a store that is sealed again; None if they do not change.

    Records that were encoded since the last seal have the metadata of the source, so the values
    that an earlier refresh has set for them are left out. The seal replaces records and annotations
    in one step: whenever a run is killed, the next one finds the same records to compare.

    Args:
        storage: The store.
        sealed: Its dataset.json.
        revisions: The units that were encoded again, with their revision now.
    """
    store = LatentStore(storage.root)
    refreshed = _refreshed(storage, store)
    changed = [unit for unit in revisions if revisions[unit] != sealed.revisions.get(unit, 0)]
    commits = (read_commit(storage, unit, revisions[unit]) for unit in changed)
    keys = {entry.key for commit in commits for entry in commit.items if not entry.kept}
    stale = sorted(refreshed.keys() & keys)
    return _without(store, refreshed, stale) if stale else None


def refresh_metadata(storage: Storage, plan: Plan, found: Comparison) -> RefreshSummary:
    """Bring the metadata of the items that a comparison found into a sealed store.

    The caller holds the store.
    """
    store = LatentStore(storage.root)
    refreshed = _refreshed(storage, store)
    new, failures = _read(to_items(found.described_rows))
    changes = _changes(store, new, refreshed)
    names = [name for name, _ in changes.names.most_common() if name and is_column(name)]
    names = [name for name in names if name not in STORED][:MAX_NAMES]
    rows = _chosen(changes.values, set(names))
    version = 0
    if rows:
        table = EMPTY if store.annotations is None else store.annotations.table
        table = merged(table, table_of(rows))
        version = publish(storage, store, table, changed=True, refreshed=True).version
    broken = pa.array([key for key, _ in failures], pa.string())
    read = pc.invert(pc.is_in(found.described_rows["key"], value_set=broken))
    units = [n for n, good in zip(found.described_units, read.to_pylist(), strict=True) if good]
    amend(plan, found.described_rows.filter(read), units, storage, _DESCRIPTION)
    return RefreshSummary(
        records=len(rows),
        values=sum(map(len, rows.values())),
        version=version,
        kept=changes.kept,
        removed=changes.removed,
        ignored=tuple(sorted(changes.names.keys() - set(names))),
        unreadable=len(failures),
        reasons=tuple(failures[:MAX_LISTED]),
    )


def _read(items: Sequence[Item]) -> tuple[dict[str, dict[str, Any]], list[tuple[str, str]]]:
    """The metadata of items by key, and (key, reason) of those that cannot be read."""

    def read(item: Item) -> dict[str, Any] | str:
        try:
            return read_metadata(item)
        except ItemError as error:
            return str(error)

    new: dict[str, dict[str, Any]] = {}
    failures: list[tuple[str, str]] = []
    with ThreadPoolExecutor(_READERS, thread_name_prefix="sidecars") as pool:
        for item, result in zip(items, pool.map(read, items), strict=True):
            if isinstance(result, str):
                failures.append((item.key, result))
            else:
                new[item.key] = result
    return new, failures


def _refreshed(storage: Storage, store: LatentStore) -> dict[str, dict[str, list[Any]]]:
    """The values that earlier refreshes have set, by key and name."""
    entry = store.info.annotation
    values: dict[str, dict[str, list[Any]]] = defaultdict(lambda: defaultdict(list))
    for before, after in () if entry is None else refreshed_versions(storage, entry):
        for key in after.table["key"].to_pylist():
            old = {} if before is None else before.values(key)
            for name, value in after.values(key).items():
                if name not in old or old[name] != value:
                    values[key][name].append(value)
    return values


def _own(
    annotations: Annotations | None, key: str, refreshed: Mapping[str, Mapping[str, list[Any]]]
) -> frozenset[str]:
    """The names of a record whose values `annotate` has set."""
    if annotations is None:
        return frozenset()
    by_refresh = refreshed.get(key, {})
    return frozenset(
        name
        for name, value in annotations.values(key).items()
        if value not in by_refresh.get(name, ())
    )


def _without(
    store: LatentStore, refreshed: Mapping[str, Mapping[str, list[Any]]], keys: Sequence[str]
) -> pa.Table:
    """The annotations without the values that a refresh has set for some keys."""
    if store.annotations is None:
        return EMPTY
    table = store.annotations.table
    rest = table.filter(pc.invert(pc.is_in(table["key"], value_set=pa.array(keys, pa.string()))))
    own = {key: _own(store.annotations, key, refreshed) for key in keys}
    rows = _chosen({key: store.annotations.values(key) for key in keys}, own)
    return merged(rest, table_of(rows)) if rows else rest


def _changes(
    store: LatentStore,
    new: Mapping[str, dict[str, Any]],
    refreshed: Mapping[str, Mapping[str, list[Any]]],
) -> _Found:
    """Compare the metadata of the source with that of the records."""
    found = _Found()
    for key, text in _stored(store) if new else ():
        if key in new:
            own = _own(store.annotations, key, refreshed)
            found.compare(key, json.loads(text), new[key], own)
    return found


def _stored(store: LatentStore) -> Iterator[tuple[str, str]]:
    """Key and metadata of every record."""
    for batch in metadata_of(store).iter_batches(
        _ROWS, columns=["key", "metadata"], use_threads=False
    ):
        yield from zip(batch["key"].to_pylist(), batch["metadata"].to_pylist(), strict=True)


def _chosen(
    values: Mapping[str, Mapping[str, Any]], names: Collection[str] | Mapping[str, Collection[str]]
) -> dict[str, dict[str, Any]]:
    """The values with these names, which may differ by key; keys without any are left out."""
    rows = {
        key: {
            name: value
            for name, value in row.items()
            if name in (names[key] if isinstance(names, Mapping) else names)
        }
        for key, row in values.items()
    }
    return {key: row for key, row in rows.items() if row}
