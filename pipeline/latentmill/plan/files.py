"""Writes the plan's files, with plan.json last, and reads them unit by unit."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq
import xxhash
from pydantic import TypeAdapter

from latentmill.encoding.lanes import PACKING
from latentmill.encoding.stored import parse_json
from latentmill.errors import StoreError
from latentmill.plan.drafting import Draft
from latentmill.plan.items import ITEMS_SCHEMA, to_items, unit_hash
from latentmill.plan.plan import PLAN, PLAN_PATH, FieldEntry, Plan, PlanPart, Unit
from latentmill.sources.base import Item
from latentmill.storage.storage import Storage, writing

FORMAT_VERSION = 2

# A row group gets whole units until it has this many items. This keeps the footer small, and
# reading the row group of one unit fast.
ROW_GROUP_ITEMS = 2048
HASH_BLOCK = 1 << 22

UNITS_SCHEMA = pa.schema(
    [
        pa.field("number", pa.int32(), nullable=False),
        pa.field("items", pa.int32(), nullable=False),
        pa.field("seconds", pa.float64(), nullable=False),
        pa.field("bytes", pa.int64(), nullable=False),
        pa.field("hash", pa.string(), nullable=False),
        pa.field("row_group", pa.int32(), nullable=False),
    ]
)


def freeze(plan: Plan, draft: Draft, storage: Storage) -> Plan:
    """Write the plan to a store that has none: the items and units first, plan.json last.

    Returns the plan with the units of the draft.
    """
    return extend(dataclasses.replace(plan, units=(), parts=()), draft, storage)


def extend(plan: Plan, draft: Draft, storage: Storage) -> Plan:
    """Add a draft's items as new units, in separate files. The other units do not change.

    The extension takes effect when plan.json is replaced, in one step.
    """
    totals = draft.totals
    part = PlanPart(
        number=len(plan.parts),
        revision=0,
        units=len(draft.sizes),
        items=totals.items,
        seconds=totals.micros / 1e6,
        estimated_seconds=totals.estimated_micros / 1e6,
        estimated_items=totals.estimated_items,
        bytes=totals.bytes,
        formats=dict(sorted(totals.formats.items())),
    )
    groups = _row_groups(draft, len(plan.units))
    part, units = write_part(part, groups, storage)
    longer = dataclasses.replace(plan, units=plan.units + units, parts=(*plan.parts, part))
    write_document(longer, storage)
    return longer


def copy(plan: Plan, source: Storage, storage: Storage) -> None:
    """Copy a plan with its items to a store that has no plan, or an earlier version of this one.

    Files that exist already with the right content are kept.
    """
    for part in plan.parts:
        for path, digest in (
            (part.items_file, part.items_hash),
            (part.units_file, part.units_hash),
        ):
            if storage.exists(path):
                with storage.open(path) as file:
                    if _hash_of(file) == digest:
                        continue
            with storage.scratch_file(path) as temporary, source.open(path) as file:
                where = storage.named(path) if storage.local else str(temporary)
                with writing(where), temporary.open("wb") as target:
                    while block := file.read(HASH_BLOCK):
                        target.write(block)
                storage.delete(path)  # left by a copy that was interrupted
                storage.publish(temporary, path)
    write_document(plan, storage)


RowGroup = tuple[Sequence[Unit], pa.Table]


def _row_groups(draft: Draft, first: int) -> Iterator[RowGroup]:
    """Row groups: several units of a draft with their items. `first` is the first unit number."""
    tables, rest = draft.tables(), pa.Table.from_batches([], ITEMS_SCHEMA)
    number, todo = first, iter(draft.sizes)
    while cuts := list(_enough(todo)):
        wanted = sum(cut.items for cut in cuts)
        parts = [rest]
        while sum(map(len, parts)) < wanted:
            drafted = next(tables)
            unit = pa.array([0] * len(drafted), pa.int32())  # numbered when it is written
            columns = [unit, *(drafted[name] for name in ITEMS_SCHEMA.names[1:])]
            parts.append(pa.Table.from_arrays(columns, schema=ITEMS_SCHEMA))
        table = pa.concat_tables(parts).combine_chunks()
        table, rest = table.slice(0, wanted), table.slice(wanted)
        units, start = [], 0
        for cut in cuts:
            digest = unit_hash(table.slice(start, cut.items))
            units.append(Unit(number, cut.items, cut.micros / 1e6, cut.bytes, digest))
            number, start = number + 1, start + cut.items
        yield units, table


def _enough(cuts: Iterator[Any]) -> Iterator[Any]:
    items = 0
    for cut in cuts:
        yield cut
        items += cut.items
        if items >= ROW_GROUP_ITEMS:
            return


def write_part(
    part: PlanPart, groups: Iterable[RowGroup], storage: Storage
) -> tuple[PlanPart, tuple[Unit, ...]]:
    """Write the items and units of a part to new files, which plan.json does not list yet.

    Returns the part with sizes and hashes, and its units with file and row group. The revision is
    raised if files of the requested one exist; an interrupted run leaves such files.
    """
    units: list[Unit] = []
    with storage.scratch_file(part.items_file) as temporary:
        with writing(storage.named(part.items_file) if storage.local else str(temporary)):
            _write_items(temporary, groups, units)
            size = temporary.stat().st_size
            with temporary.open("rb") as file:
                digest = _hash_of(file)
        rows = {name: [getattr(unit, name) for unit in units] for name in UNITS_SCHEMA.names}
        buffer = io.BytesIO()
        pq.write_table(pa.Table.from_pydict(rows, UNITS_SCHEMA), buffer, compression="zstd")
        data = buffer.getvalue()
        while not (
            storage.publish(temporary, part.items_file) and storage.create(part.units_file, data)
        ):
            part = dataclasses.replace(part, revision=part.revision + 1)
    written = dataclasses.replace(part, items_bytes=size, items_hash=digest, units_hash=_hash(data))
    return written, tuple(dataclasses.replace(unit, file=part.items_file) for unit in units)


def _write_items(path: Path, groups: Iterable[RowGroup], units: list[Unit]) -> None:
    with pq.ParquetWriter(
        path,
        ITEMS_SCHEMA,
        compression="zstd",
        use_dictionary=["unit", "column", "group", "role"],
        write_page_checksum=True,
    ) as writer:
        for number, (some, table) in enumerate(groups):
            column = [unit.number for unit in some for _ in range(unit.items)]
            numbered = table.set_column(0, ITEMS_SCHEMA.field(0), pa.array(column, pa.int32()))
            writer.write_table(numbered, row_group_size=len(table))
            units += [dataclasses.replace(unit, row_group=number) for unit in some]


def write_document(plan: Plan, storage: Storage) -> None:
    """Write plan.json, which puts the plan into effect."""
    names = [
        field.name
        for field in dataclasses.fields(Plan)
        if field.name not in ("units", "parts", "field")
    ]
    document = {
        "format_version": FORMAT_VERSION,
        **{name: getattr(plan, name) for name in names},
        **({} if plan.field is None else {"field": dataclasses.asdict(plan.field)}),
        "items": plan.num_items,
        "units": len(plan.units),
        "parts": [dataclasses.asdict(part) for part in plan.parts],
    }
    storage.write(PLAN_PATH, json.dumps(document, indent=2).encode())


def load(storage: Storage) -> Plan | None:
    """Read the store's plan, without its items, or None if it has none."""
    text = storage.read_if_exists(PLAN_PATH)
    if text is None:
        return None
    try:
        document = parse_json(text)
        return _read_plan(document, storage)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise StoreError(
            f"Store {storage.root}: {PLAN_PATH} is damaged: restore it from a backup, or encode "
            "into a new output folder."
        ) from error


def _read_plan(document: dict[str, Any], storage: Storage) -> Plan:
    if document.pop("format_version") != FORMAT_VERSION:
        raise StoreError(
            f"The plan of store {storage.root} does not have format version {FORMAT_VERSION}, "
            "which this latentmill reads: use the latentmill version that wrote it."
        )
    num_items, num_units = document.pop("items"), document.pop("units")
    parts = tuple(PlanPart(**_typed(PlanPart, part)) for part in document.pop("parts"))
    if not all(type(n) is int and n >= 0 for part in parts for n in (part.number, part.revision)):
        raise ValueError("a part has an invalid number")  # numbers become file names
    _typed(Plan, document)
    if not 1 <= document.get("packing", 1) <= PACKING:
        raise StoreError(
            f"Store {storage.root} was planned by a later version of latentmill: update latentmill."
        )
    document["extensions"] = tuple(document["extensions"])
    if (entry := document.get("field")) is not None:
        document["field"] = FieldEntry(**entry)
    sizes = storage.list(PLAN)
    units: list[Unit] = []
    for part in parts:
        if sizes.get(part.items_file.rpartition("/")[2]) != part.items_bytes:
            raise _foreign(storage, part.items_file)
        data = storage.read_if_exists(part.units_file)
        if data is None or _hash(data) != part.units_hash:
            raise _foreign(storage, part.units_file)
        # Not pq.read_table: it scans on Arrow's I/O threads whatever use_threads says. Such a
        # thread may still hold `data` when the interpreter exits; releasing it then can abort the
        # process.
        parquet = pq.ParquetFile(pa.BufferReader(data), pre_buffer=False)
        table = parquet.read(use_threads=False)
        if not table.schema.equals(UNITS_SCHEMA):
            raise _foreign(storage, part.units_file)
        units += (Unit(**row, file=part.items_file) for row in table.to_pylist())
    plan = Plan(**document, units=tuple(units), parts=parts)
    if plan.num_items != num_items or len(units) != num_units:
        raise ValueError("the parts do not add up")
    return plan


def _typed(kind: Any, values: dict[str, Any]) -> dict[str, Any]:
    """Return the values. Raises ValueError if their types are not those of the fields of `kind`."""
    _adapter(kind).validate_json(json.dumps(values), strict=True)
    return values


@functools.cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    """Building one takes longer than reading a plan."""
    return TypeAdapter(kind)


def check_items(plan: Plan, storage: Storage) -> None:
    """Raise StoreError if a file of items does not have the hash in plan.json."""
    for part in plan.parts:
        with storage.open(part.items_file) as file:
            if _hash_of(file) != part.items_hash:
                raise _foreign(storage, part.items_file)


def _foreign(storage: Storage, path: str) -> StoreError:
    return StoreError(
        f"Store {storage.root}: {path} is missing, damaged or does not belong to {PLAN_PATH}: "
        f"restore the whole folder {PLAN} from a backup, or encode into a new output folder."
    )


def read_items(storage: Storage, unit: Unit) -> tuple[Item, ...]:
    """Read a unit's items, in order. Raises StoreError if they are not those of the unit."""
    with open_items(storage, unit.file) as read:
        table = read(unit.row_group, None)
    table = table.filter(pa.array([n == unit.number for n in table["unit"].to_pylist()]))
    if len(table) != unit.items:
        raise _foreign(storage, unit.file)
    return to_items(table)


def iter_units(
    storage: Storage, plan: Plan, columns: Sequence[str] | None = None
) -> Iterator[tuple[Unit, pa.Table]]:
    """Every unit with its items, as rows of `ITEMS_SCHEMA`. Holds one row group in memory."""
    for file, of_file in itertools.groupby(plan.units, key=lambda unit: unit.file):
        with open_items(storage, file) as read:
            for row_group, some in itertools.groupby(of_file, key=lambda unit: unit.row_group):
                table, start = read(row_group, columns), 0
                for unit in some:
                    yield unit, table.slice(start, unit.items)
                    start += unit.items
                if start != len(table):
                    raise _foreign(storage, file)


def iter_keys(storage: Storage, plan: Plan) -> Iterator[str]:
    """The keys of all items, in the plan's order."""
    for _, table in iter_units(storage, plan, ["key"]):
        yield from table["key"].to_pylist()


@contextlib.contextmanager
def open_items(
    storage: Storage, path: str
) -> Iterator[Callable[[int, Sequence[str] | None], pa.Table]]:
    """Open a file of items. Yields a function that reads columns (None: all) of a row group."""
    try:
        with storage.open(path) as file:
            parquet = pq.ParquetFile(file, pre_buffer=False, page_checksum_verification=True)
            yield lambda group, columns: _whole(
                parquet.read_row_group(group, columns, use_threads=False), columns
            )
    except (pa.ArrowException, ValueError, IndexError) as error:
        raise _foreign(storage, path) from error


def _whole(table: pa.Table, columns: Sequence[str] | None) -> pa.Table:
    """Add the columns that plans of earlier versions do not have, with nulls."""
    for name in columns or ITEMS_SCHEMA.names:
        if name not in table.column_names and ITEMS_SCHEMA.field(name).nullable:
            field = ITEMS_SCHEMA.field(name)
            table = table.append_column(field, pa.nulls(len(table), field.type))
    return table


def _hash(data: bytes) -> str:
    return "xxh3:" + xxhash.xxh3_128_hexdigest(data)


def _hash_of(file: BinaryIO) -> str:
    digest = xxhash.xxh3_128()
    while block := file.read(HASH_BLOCK):
        digest.update(block)
    return "xxh3:" + digest.hexdigest()
