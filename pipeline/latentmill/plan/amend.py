"""Updates the planned rows of items whose files have changed, so that they are encoded again."""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import xxhash
from numpy.typing import NDArray

from latentmill.plan.files import RowGroup, iter_units, write_document, write_part
from latentmill.plan.items import (
    ITEMS_SCHEMA,
    LONGEST_SECONDS,
    estimated_seconds,
    extension_of,
    to_items,
    unit_hash,
)
from latentmill.plan.plan import Plan, PlanPart, Unit
from latentmill.sources.base import known_seconds
from latentmill.storage.storage import Storage


def amend(
    plan: Plan,
    changed: pa.Table,
    in_units: Iterable[int],
    storage: Storage,
    columns: Sequence[str] = ITEMS_SCHEMA.names[1:],
) -> Plan:
    """Replace the values in `columns` of planned items by those in `changed`.

    `changed` has rows of `DRAFT_SCHEMA`, `in_units` the units of these items. If their files have
    changed, this invalidates the commits of these units. Units keep their items and their numbers,
    and the totals of the plan are updated. Replaced files are deleted last.
    """
    touched = set(in_units)
    if not touched:
        return plan
    units: list[Unit] = []
    parts: list[PlanPart] = []
    replaced: list[str] = []
    begin, rows = 0, RowsByKey(changed)
    for part in plan.parts:
        own = plan.units[begin : begin + part.units]
        begin += part.units
        if touched.isdisjoint(unit.number for unit in own):
            parts.append(part)
            units += own
            continue
        alone = dataclasses.replace(plan, units=own, parts=(part,))
        newer = dataclasses.replace(part, revision=part.revision + 1)
        totals = _Totals(Counter(part.formats))
        groups = _amended(alone, rows, touched, storage, columns, totals)
        newer, rewritten = write_part(newer, groups, storage)
        parts.append(totals.of(newer, rewritten))
        units += rewritten
        replaced += [part.items_file, part.units_file]
    amended = dataclasses.replace(plan, units=tuple(units), parts=tuple(parts))
    write_document(amended, storage)
    for path in replaced:
        storage.delete(path)
    return amended


class RowsByKey:
    """Finds rows of a table by their keys, without going over the whole table each time."""

    def __init__(self, table: pa.Table) -> None:
        self._table = table
        hashes = _hashes(table["key"])
        self._order = np.argsort(hashes)
        self._hashes = hashes[self._order]

    def of(self, keys: pa.ChunkedArray) -> pa.Table:
        """The rows with these keys, in the order of the table; a few others if hashes are equal."""
        wanted = _hashes(keys)
        begin = np.searchsorted(self._hashes, wanted, "left")
        end = np.searchsorted(self._hashes, wanted, "right")
        found = [self._order[a:b] for a, b in zip(begin.tolist(), end.tolist(), strict=True)]
        places = np.unique(np.concatenate([self._order[:0], *found]))
        runs = np.split(places, np.flatnonzero(np.diff(places) != 1) + 1)
        some = [self._table.slice(int(run[0]), len(run)) for run in runs if len(run)]
        return pa.concat_tables([self._table.slice(0, 0), *some])


def _hashes(keys: pa.ChunkedArray) -> NDArray[np.uint64]:
    hashes = (
        xxhash.xxh3_64_intdigest(key.encode()) for chunk in keys.chunks for key in chunk.to_pylist()
    )
    return np.fromiter(hashes, np.uint64, len(keys))


@dataclass
class _Totals:
    """Totals of a part, counted while it is written."""

    formats: Counter[str]
    known_seconds: float = 0.0
    estimated_items: int = 0

    def add(self, table: pa.Table) -> None:
        """Count the lengths of rows of `ITEMS_SCHEMA`."""
        columns = (table[name].to_pylist() for name in ("seconds", "duration"))
        for seconds, duration in zip(*columns, strict=True):
            known = duration if seconds is None else seconds
            self.known_seconds += min(known or 0.0, LONGEST_SECONDS)
            self.estimated_items += known is None

    def of(self, part: PlanPart, units: Sequence[Unit]) -> PlanPart:
        """The part with these totals and those of its units."""
        seconds = round(sum(unit.seconds for unit in units), 6)
        estimated = max(0.0, round(seconds - self.known_seconds, 6))
        return dataclasses.replace(
            part,
            seconds=seconds,
            estimated_seconds=estimated if self.estimated_items else 0.0,
            estimated_items=self.estimated_items,
            bytes=sum(unit.bytes for unit in units),
            formats={name: count for name, count in sorted(self.formats.items()) if count > 0},
        )


def _amended(
    part: Plan,
    rows: RowsByKey,
    touched: set[int],
    storage: Storage,
    columns: Sequence[str],
    totals: _Totals,
) -> Iterator[RowGroup]:
    """The row groups of a part with the new values, added to `totals`."""
    units = iter_units(storage, part)
    for _, some in itertools.groupby(units, key=lambda pair: pair[0].row_group):
        pairs = [
            _amend(unit, table, rows.of(table["key"]), columns, totals)
            if unit.number in touched
            else (unit, table)
            for unit, table in some
        ]
        for _, table in pairs:
            totals.add(table)
        yield [unit for unit, _ in pairs], pa.concat_tables(table for _, table in pairs)


def _amend(
    unit: Unit,
    table: pa.Table,
    changed: pa.Table,
    columns: Sequence[str],
    totals: _Totals,
) -> tuple[Unit, pa.Table]:
    """Replace some columns in the rows of a unit's changed items."""
    before = table
    place = pc.index_in(table["key"], changed["key"]).to_pylist()
    rows = pa.array([n if at is None else len(table) + at for n, at in enumerate(place)])
    for name in columns:
        both = pa.chunked_array([*table[name].chunks, *changed[name].chunks], table[name].type)
        number = table.schema.get_field_index(name)
        table = table.set_column(number, ITEMS_SCHEMA.field(name), both.take(rows))
    table = table.combine_chunks()
    unit = dataclasses.replace(unit, hash=unit_hash(table))
    if "size" not in columns:  # the files are the same
        return unit, table
    # Files in tars and tables have the name of the tar or table here, before and after.
    totals.formats.subtract(map(extension_of, before["uri"].to_pylist()))
    totals.formats.update(map(extension_of, table["uri"].to_pylist()))
    unit = dataclasses.replace(
        unit,
        seconds=_seconds(unit, before, place, changed),
        bytes=sum(table["size"].to_pylist()),
    )
    return unit, table


def _seconds(unit: Unit, before: pa.Table, place: Sequence[int | None], changed: pa.Table) -> float:
    """The length of an amended unit: that of its unchanged items, and that of the new files.

    Not all that unknown lengths were estimated from is stored, so they are not estimated again: the
    unchanged items get their share of the estimates that the unit's length contains.
    """
    exact, guessed = [0.0, 0.0], [0.0, 0.0]  # of changed and of unchanged items
    for item, at in zip(to_items(before), place, strict=True):
        lengths = guessed if known_seconds(item) is None else exact
        lengths[at is None] += estimated_seconds(item)
    same = exact[True]
    if guessed[True]:
        same += max(0.0, unit.seconds - sum(exact)) * guessed[True] / sum(guessed)
    rows = pa.array([at for at in place if at is not None], pa.int64())
    new: float = sum(changed["micros"].take(rows).to_pylist()) / 1e6
    return round(same + new, 6)
