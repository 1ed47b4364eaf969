"""Updates the planned rows of items whose files have changed, so that they are encoded again."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Sequence

import pyarrow as pa
import pyarrow.compute as pc

from latentmill.plan.files import RowGroup, iter_units, write_document, write_part
from latentmill.plan.items import ITEMS_SCHEMA, estimated_seconds, to_items, unit_hash
from latentmill.plan.plan import Plan, PlanPart, Unit
from latentmill.storage.storage import Storage


def amend(
    plan: Plan,
    changed: pa.Table,
    in_units: Iterable[int],
    storage: Storage,
    columns: Sequence[str] = ITEMS_SCHEMA.names[1:],
) -> Plan:
    """Replace values of items in the plan: those of `columns`, from rows of `DRAFT_SCHEMA`.

    If files have changed, this invalidates the commits of the units `in_units`, which have these
    items. Units keep their items and their numbers. Replaced files are deleted last.
    """
    touched = set(in_units)
    if not touched:
        return plan
    units: list[Unit] = []
    parts: list[PlanPart] = []
    replaced: list[str] = []
    begin = 0
    for part in plan.parts:
        own = plan.units[begin : begin + part.units]
        begin += part.units
        if touched.isdisjoint(unit.number for unit in own):
            parts.append(part)
            units += own
            continue
        alone = dataclasses.replace(plan, units=own, parts=(part,))
        newer = dataclasses.replace(part, revision=part.revision + 1)
        groups = _amended(alone, changed, touched, storage, columns)
        newer, rewritten = write_part(newer, groups, storage)
        parts.append(newer)
        units += rewritten
        replaced += [part.items_file, part.units_file]
    amended = dataclasses.replace(plan, units=tuple(units), parts=tuple(parts))
    write_document(amended, storage)
    for path in replaced:
        storage.delete(path)
    return amended


def _amended(
    part: Plan, changed: pa.Table, touched: set[int], storage: Storage, columns: Sequence[str]
) -> Iterator[RowGroup]:
    units = iter_units(storage, part)
    for _, some in itertools.groupby(units, key=lambda pair: pair[0].row_group):
        pairs = [
            _amend(unit, table, changed, columns) if unit.number in touched else (unit, table)
            for unit, table in some
        ]
        yield [unit for unit, _ in pairs], pa.concat_tables(table for _, table in pairs)


def _amend(
    unit: Unit, table: pa.Table, changed: pa.Table, columns: Sequence[str]
) -> tuple[Unit, pa.Table]:
    """Replace some columns in the rows of a unit's changed items."""
    place = pc.index_in(table["key"], changed["key"]).to_pylist()
    rows = pa.array([n if at is None else len(table) + at for n, at in enumerate(place)])
    for name in columns:
        both = pa.chunked_array([*table[name].chunks, *changed[name].chunks], table[name].type)
        number = table.schema.get_field_index(name)
        table = table.set_column(number, ITEMS_SCHEMA.field(name), both.take(rows))
    table = table.combine_chunks()
    items = to_items(table)
    unit = dataclasses.replace(
        unit,
        seconds=sum(estimated_seconds(item) for item in items),
        bytes=sum(item.size for item in items),
        hash=unit_hash(table),
    )
    return unit, table
