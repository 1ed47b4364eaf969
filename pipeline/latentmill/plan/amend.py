"""Updates the planned rows of items whose files have changed, so that they are encoded again."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator

import pyarrow as pa
import pyarrow.compute as pc

from latentmill.plan.compare import Comparison
from latentmill.plan.files import RowGroup, iter_units, write_document, write_part
from latentmill.plan.items import ITEMS_SCHEMA, estimated_seconds, to_items, unit_hash
from latentmill.plan.plan import Part, Plan, Unit
from latentmill.storage.storage import Storage


def amend(plan: Plan, found: Comparison, storage: Storage) -> Plan:
    """Replace the rows of changed items in the plan, which invalidates their units' commits.

    Units keep their items and their numbers. Replaced files are deleted last.
    """
    touched = set(found.units)
    units: list[Unit] = []
    parts: list[Part] = []
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
        newer, changed = write_part(newer, _amended(alone, found, touched, storage), storage)
        parts.append(newer)
        units += changed
        replaced += [part.items_file, part.units_file]
    amended = dataclasses.replace(plan, units=tuple(units), parts=tuple(parts))
    write_document(amended, storage)
    for path in replaced:
        storage.delete(path)
    return amended


def _amended(
    part: Plan, found: Comparison, touched: set[int], storage: Storage
) -> Iterator[RowGroup]:
    units = iter_units(storage, part)
    for _, some in itertools.groupby(units, key=lambda pair: pair[0].row_group):
        pairs = [_amend(u, t, found.changed) if u.number in touched else (u, t) for u, t in some]
        yield [unit for unit, _ in pairs], pa.concat_tables(table for _, table in pairs)


def _amend(unit: Unit, table: pa.Table, changed: pa.Table) -> tuple[Unit, pa.Table]:
    """Replace the rows of a unit's changed items."""
    place = pc.index_in(table["key"], changed["key"]).to_pylist()
    rows = [n if at is None else len(table) + at for n, at in enumerate(place)]
    unit_column = pa.array([unit.number] * len(changed), pa.int32())
    columns = [unit_column, *(changed[name] for name in ITEMS_SCHEMA.names[1:])]
    both = pa.concat_tables([table, pa.Table.from_arrays(columns, schema=ITEMS_SCHEMA)])
    table = both.take(pa.array(rows)).combine_chunks()
    items = to_items(table)
    unit = dataclasses.replace(
        unit,
        seconds=sum(estimated_seconds(item) for item in items),
        bytes=sum(item.size for item in items),
        hash=unit_hash(table),
    )
    return unit, table
