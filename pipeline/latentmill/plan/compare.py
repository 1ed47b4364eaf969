"""Compares a source with its plan: new, changed and vanished items.

Both sides are sorted by key on the local disk and read in parallel, so that memory does not grow
with them. Only the changed items are kept in memory.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from latentmill.plan.drafting import Draft, UnitLimits
from latentmill.plan.files import iter_units
from latentmill.plan.items import DRAFT_SCHEMA
from latentmill.plan.plan import Plan
from latentmill.plan.sort import Sorter
from latentmill.storage.storage import Storage

MAX_NAMED = 20

_FILE = ("key", "uri", "size", "version", "start", "duration")
_NEW_COLUMNS = (*_FILE, "sidecars", "sidecar_versions", "metadata")
_OLD_COLUMNS = (*_NEW_COLUMNS, "unit")


@dataclass(frozen=True)
class ComparedItem:
    """The values of an item that are compared."""

    key: str
    uri: str
    size: int
    version: str
    start: float | None
    duration: float | None
    sidecars: list[str]
    sidecar_versions: str | None
    metadata: str
    unit: int = -1

    def same(self, other: ComparedItem) -> bool:
        """Whether both rows can be the same file. Values that a listing did not provide match."""
        sizes = not (self.size and other.size) or self.size == other.size
        versions = not (self.version and other.version) or self.version == other.version
        segments = (self.start, self.duration) == (other.start, other.duration)
        return sizes and versions and segments and self.uri == other.uri

    def same_metadata(self, other: ComparedItem) -> bool:
        """Whether the captions and other metadata can be unchanged. Unknown versions match."""
        versions = (self.sidecar_versions, other.sidecar_versions)
        same_files = self.sidecars == other.sidecars and (
            None in versions or versions[0] == versions[1]
        )
        return same_files and self.metadata == other.metadata


@dataclass
class Comparison:
    """Differences between a listing and a plan.

    Attributes:
        new: Number of items that are not in the plan.
        vanished: Number of items that are no longer in the source.
        changed: The items whose file has changed, as rows of `DRAFT_SCHEMA`.
        units: The unit numbers of the changed items, in the same order.
        described: Number of items whose file is unchanged but whose sidecars or metadata changed.
        described_rows: These items, and those of which this is not known, as rows of
            `DRAFT_SCHEMA`; empty unless they are requested.
        described_units: Their unit numbers, in the same order.
        new_keys: The first few keys of the new items; likewise for the other kinds.
    """

    new: int = 0
    vanished: int = 0
    described: int = 0
    changed: pa.Table = field(default_factory=lambda: pa.Table.from_batches([], DRAFT_SCHEMA))
    units: list[int] = field(default_factory=list)
    described_rows: pa.Table = field(
        default_factory=lambda: pa.Table.from_batches([], DRAFT_SCHEMA)
    )
    described_units: list[int] = field(default_factory=list)
    new_keys: list[str] = field(default_factory=list)
    vanished_keys: list[str] = field(default_factory=list)
    described_keys: list[str] = field(default_factory=list)

    @property
    def changed_keys(self) -> list[str]:
        keys: list[str] = self.changed["key"].slice(0, MAX_NAMED).to_pylist()
        return keys


def compare(
    plan: Plan,
    storage: Storage,
    listed: Draft,
    limits: UnitLimits,
    refine: Callable[[pa.Table], pa.Table] = lambda table: table,
    *,
    described_rows: bool = False,
) -> tuple[Comparison, Draft]:
    """Compare a listing with a plan. Also returns the new items, split into units.

    `refine` completes rows of new items, for example with lengths from their headers.
    `described_rows` collects the rows of items whose metadata have changed.
    """
    new = Sorter(listed.folder / "new", ("key",))
    for table in listed.tables():
        new.push(table)
    old = Sorter(listed.folder / "old", ("key",))
    for table in _row_groups(plan, storage):
        old.push(table)
    found = Comparison()
    with contextlib.ExitStack() as undo:
        fresh = undo.enter_context(Draft(limits))
        sorter = Sorter(fresh.folder / "sorting", ("block", "key"))
        for table in map(refine, _unknown(new, old, found, described_rows)):
            fresh.totals.add(table)
            sorter.push(table)
        fresh.fill(sorter.tables())
        undo.pop_all()
    return found, fresh


def _row_groups(plan: Plan, storage: Storage) -> Iterator[pa.Table]:
    """The planned items, in tables of at least 32,768 rows."""
    some: list[pa.Table] = []
    for _, table in iter_units(storage, plan, _OLD_COLUMNS):
        some.append(table)
        if sum(map(len, some)) >= 1 << 15:
            yield pa.concat_tables(some)
            some = []
    if some:
        yield pa.concat_tables(some)


def _unknown(
    new: Sorter, old: Sorter, found: Comparison, described_rows: bool
) -> Iterator[pa.Table]:
    """Merge both sides by key. Yields the rows of new items, and counts the others."""
    planned = _rows(old, _OLD_COLUMNS)
    before = next(planned, None)
    for table in new.tables():
        is_new, is_changed, is_described = [], [], []
        for row in _rows_of(table, _NEW_COLUMNS):
            while before is not None and before.key < row.key:
                _vanished(before, found)
                before = next(planned, None)
            known = before if before is not None and before.key == row.key else None
            is_new.append(known is None)
            is_changed.append(known is not None and not known.same(row))
            is_described.append(False)
            if known is not None:
                if is_changed[-1]:
                    found.units.append(known.unit)
                elif not known.same_metadata(row):
                    found.described += 1
                    is_described[-1] = described_rows
                    if found.described <= MAX_NAMED:
                        found.described_keys.append(row.key)
                elif described_rows and None in (known.sidecar_versions, row.sidecar_versions):
                    is_described[-1] = bool(row.sidecars)  # their content decides
                if is_described[-1]:
                    found.described_units.append(known.unit)
                before = next(planned, None)
        found.changed = pa.concat_tables([found.changed, table.filter(pa.array(is_changed))])
        if any(is_described):
            rows = table.filter(pa.array(is_described))
            found.described_rows = pa.concat_tables([found.described_rows, rows])
        if any(is_new):
            unknown = table.filter(pa.array(is_new))
            found.new += len(unknown)
            found.new_keys += unknown["key"].slice(0, MAX_NAMED).to_pylist()
            del found.new_keys[MAX_NAMED:]
            yield unknown
    while before is not None:
        _vanished(before, found)
        before = next(planned, None)


def _vanished(row: ComparedItem, found: Comparison) -> None:
    found.vanished += 1
    if len(found.vanished_keys) < MAX_NAMED:
        found.vanished_keys.append(row.key)


def _rows(sorter: Sorter, columns: tuple[str, ...]) -> Iterator[ComparedItem]:
    for table in sorter.tables():
        yield from _rows_of(table, columns)


def _rows_of(table: pa.Table, columns: tuple[str, ...]) -> Iterator[ComparedItem]:
    values: list[list[Any]] = [table[name].to_pylist() for name in columns]
    return (ComparedItem(*row) for row in zip(*values, strict=True))
