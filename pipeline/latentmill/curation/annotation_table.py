"""Tables of annotated values: read from the user's file, merged with those of the store."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from latentmill.encoding.stored import parse_json
from latentmill.errors import ConfigError, SourceError
from latentmill.sources.columns import as_json, find_column
from latentmill.sources.manifest import KEYS, ManifestSource, cell_value, manifest_format
from latentmill.sources.names import as_key
from latentmill.store.annotations import (
    EXACT_INTEGERS,
    JSON,
    field_of,
    is_column,
    kind_of,
    kind_of_value,
    wider,
)
from latentmill.store.metadata import METADATA_SCHEMA
from latentmill.store.schema import json_text

MAX_NAMES = 256
_ROWS, _TEXT = 10_000, 64 << 20  # rows, or characters, that are collected before an array is made
_TAKEN_ROWS = 1024  # in one array of texts
STORED = {*METADATA_SCHEMA.names, "latent", "levels"}

EMPTY = pa.table({"key": pa.array([], pa.string())})


@dataclass(frozen=True)
class NewValues:
    """The content of a user's file.

    Attributes:
        table: The column `key` and a column for each name, in the order of the file; see
            `Annotations`.
        ignored: Columns of the file with the name of a stored field.
    """

    table: pa.Table
    ignored: tuple[str, ...]


def read_table(uri: str, key_column: str | None) -> NewValues:
    """Read a CSV, TSV, JSONL or Parquet file with a column of keys.

    Values are read as those of manifests, but all values of a CSV column have one type: numbers if
    all of them are numbers, otherwise text.
    """
    source = ManifestSource(uri, what="File")
    columns = _Columns(source.uri, plain_text=manifest_format(source.uri) in ("csv", "tsv"))
    column = None
    for place, row in source.rows():
        if column is None:
            column = find_column(list(row), key_column, KEYS, "key", source.uri)
        if column is None:
            raise SourceError(
                f"{source.uri} has no column key or id: set --key-column to one of "
                f"{', '.join(row)}."
            )
        columns.add(column, row, place)
    if column is None:
        raise SourceError(f"{source.uri} has no rows: check the file.")
    table = columns.table()
    keys = table["key"].sort()
    repeated = keys[1:].filter(pc.equal(keys[1:], keys[:-1]))
    if len(repeated):
        raise SourceError(
            f"{source.uri} has the key {repeated[0]} more than once: keep one of its rows."
        )
    return NewValues(table, tuple(sorted(columns.ignored)))


def table_of(rows: Mapping[str, Mapping[str, Any]]) -> pa.Table:
    """A table of JSON values by key and name; see `Annotations`."""
    columns = _Columns("the source", plain_text=False)
    for key, values in rows.items():
        columns.add("key", {**values, "key": key}, key)
    return columns.table()


class _Columns:
    """Collects the rows of a file: values as text in Arrow arrays, and their kinds."""

    def __init__(self, uri: str, *, plain_text: bool) -> None:
        self._uri = uri
        self._parse: Callable[[str], Any] = cell_value if plain_text else json.loads
        self._plain_text = plain_text
        self._rows: list[dict[str, Any]] = []
        self._keys: list[str] = []
        self._text = 0  # characters of the rows
        self._key_chunks: list[pa.Array] = []
        self._chunks: dict[str, list[pa.Array]] = {}
        self._kinds: dict[str, str | None] = {}
        self.ignored: set[str] = set()

    def add(self, key_column: str, row: dict[str, Any], place: str) -> None:
        key = row.get(key_column)
        if key is None or key == "":
            raise SourceError(f"{self._uri} has no {key_column} in {place}: add it.")
        if self._plain_text:
            row = {name: None if cell == "" else cell for name, cell in row.items()}
        text = as_json(row, {key_column})
        values = json.loads(text)
        self._text += len(text)
        for name in row.keys() - {key_column} - self._chunks.keys() - self.ignored:
            self._add_name(name)
        self._keys.append(as_key(str(key)))
        self._rows.append({name: values[name] for name in values.keys() - self.ignored})
        if len(self._rows) == _ROWS or self._text >= _TEXT:
            self._flush()

    def _add_name(self, name: str) -> None:
        if name in STORED:
            self.ignored.add(name)
            return
        if not name or not is_column(name):
            raise ConfigError(
                f"{self._uri}: the column {name!r} cannot be annotated: use a name of 1 to 64 "
                "printable characters without dots."
            )
        if len(self._chunks) == MAX_NAMES:
            raise ConfigError(
                f"{self._uri} has more than {MAX_NAMES} columns: leave some out, or put values "
                "that belong together into one JSON object."
            )
        self._chunks[name] = [pa.nulls(len(chunk), pa.string()) for chunk in self._key_chunks]

    def _flush(self) -> None:
        for name, chunks in self._chunks.items():
            values = [row.get(name) for row in self._rows]
            for value in values:
                kind = kind_of_value(cell_value(value) if self._plain_text else value)
                if kind != "null":
                    self._kinds[name] = wider(self._kinds.get(name, kind), kind)
            texts = values if self._plain_text else [_json(value) for value in values]
            chunks.append(pa.array(texts, pa.string()))
        self._key_chunks.append(pa.array(self._keys, pa.string()))
        self._rows, self._keys, self._text = [], [], 0

    def table(self) -> pa.Table:
        """The rows so far; names without values are left out."""
        self._flush()
        arrays, fields = [pa.chunked_array(self._key_chunks)], [EMPTY.schema.field("key")]
        for name, scalar in sorted(self._kinds.items()):
            kind = (scalar or ("str" if self._plain_text else JSON)).removesuffix(" large")
            fields.append(field_of(name, kind))
            if kind == JSON or (self._plain_text and kind == "str"):
                arrays.append(pa.chunked_array(self._chunks[name], pa.string()))
            else:
                parsed = (self._parsed(chunk, kind) for chunk in self._chunks[name])
                arrays.append(pa.chunked_array(list(parsed), fields[-1].type))
        return pa.Table.from_arrays(arrays, schema=pa.schema(fields))

    def _parsed(self, chunk: pa.Array, kind: str) -> pa.Array:
        values = [None if text is None else self._parse(text) for text in chunk.to_pylist()]
        return _array(values, kind)


def _json(value: Any) -> str | None:
    return None if value is None else json_text(value)


def _array(values: Sequence[Any], kind: str) -> pa.Array:
    if kind == "float":
        values = [None if value is None else float(value) for value in values]
    elif kind == JSON:
        values = [_json(value) for value in values]
    return pa.array(values, field_of("value", kind).type)


def without(table: pa.Table, names: Sequence[str]) -> pa.Table:
    """The table without some names, and without the keys that have no values then."""
    return with_values(table.drop_columns(list(names))) if names else table


def merged(old: pa.Table, new: pa.Table) -> pa.Table:
    """The values of both tables, by key; where both have a value, that of `new`."""
    keys = pc.unique(pa.chunked_array([*old["key"].chunks, *new["key"].chunks], pa.string()))
    keys = keys.take(pc.sort_indices(keys))
    arrays, fields = [keys], [EMPTY.schema.field("key")]
    tables = [(table, pc.index_in(keys, value_set=table["key"])) for table in (new, old)]
    for name in sorted({*old.column_names, *new.column_names} - {"key"}):
        if (found := _merged_column(name, tables)) is not None:
            kind, column = found
            arrays.append(column)
            fields.append(field_of(name, kind))
    return with_values(pa.Table.from_arrays(arrays, schema=pa.schema(fields)))


def _merged_column(
    name: str, tables: Sequence[tuple[pa.Table, pa.Array]]
) -> tuple[str, pa.ChunkedArray] | None:
    """The first value of each row, and its kind; None if there is no value.

    The second of a pair has the row of a table for each row of the result.
    """
    parts = [
        (kind_of(table.schema.field(name)), _taken(table[name], rows))
        for table, rows in tables
        if name in table.column_names
    ]
    if len(parts) == 2:  # of the old values, those that have no new ones
        (_, column), (kind, hidden) = parts
        left = pc.if_else(pc.is_valid(column), pa.scalar(None, hidden.type), hidden)
        parts[1] = (kind, left)
    parts = [part for part in parts if part[1].null_count < len(part[1])]
    return _coalesced(parts) if parts else None


def _taken(column: pa.ChunkedArray, rows: pa.Array) -> pa.ChunkedArray:
    """The values at some rows, in chunks: one array of texts has at most 2 GiB."""
    if column.type != pa.string():
        return column.take(rows)
    whole = column.cast(pa.large_string()).combine_chunks()
    slices = (rows.slice(start, _TAKEN_ROWS) for start in range(0, len(rows), _TAKEN_ROWS))
    return pa.chunked_array([whole.take(some).cast(pa.string()) for some in slices], pa.string())


def _coalesced(parts: Sequence[tuple[str, pa.ChunkedArray]]) -> tuple[str, pa.ChunkedArray]:
    """The first value of each row, in a type that contains all values exactly."""
    kinds = {kind for kind, _ in parts}
    if len(kinds) == 1 and JSON not in kinds:
        return parts[0][0], pc.coalesce(*(column for _, column in parts))
    if kinds == {"int", "float"} and all(map(_is_exact, (column for _, column in parts))):
        return "float", pc.coalesce(*(column.cast(pa.float64()) for _, column in parts))
    columns = [
        [parse_json(v) if kind == JSON and v is not None else v for v in column.to_pylist()]
        for kind, column in parts
    ]
    values = [
        next((value for value in row if value is not None), None)
        for row in zip(*columns, strict=True)
    ]
    kind = reduce(wider, {kind_of_value(value) for value in values} - {"null"}) or JSON
    kind = kind.removesuffix(" large")
    slices = (values[at : at + _TAKEN_ROWS] for at in range(0, len(values), _TAKEN_ROWS))
    chunks = [_array(some, kind) for some in slices]
    return kind, pa.chunked_array(chunks, field_of("value", kind).type)


def _is_exact(column: pa.ChunkedArray) -> bool:
    """Whether float64 has all values of a column of numbers exactly."""
    if not pa.types.is_integer(column.type):
        return True
    bounds: dict[str, int] = pc.min_max(column).as_py()
    return max(-bounds["min"], bounds["max"]) <= EXACT_INTEGERS


def with_values(table: pa.Table) -> pa.Table:
    """The table without names and keys that have no values."""
    names = [n for n in table.column_names[1:] if table[n].null_count < len(table)]
    if not names:
        return EMPTY
    valid = [pc.is_valid(table[name]) for name in names]
    return table.select(["key", *names]).filter(reduce(pc.or_, valid))
