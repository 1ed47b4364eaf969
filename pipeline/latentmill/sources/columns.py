"""Rows of a table as metadata: plain JSON values, whatever the table's types are."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa

from latentmill.errors import SourceError
from latentmill.text.redact import may_hold_secrets, redact_value

ROWS = 64
"""Of metadata, read at a time."""

METADATA_LIMIT = 16 << 20
"""Bytes of a sidecar, or of a row of a table; what is longer is no metadata."""

_LARGE = 128 << 20
_MOST_COMPRESSED = 100  # times; texts reach 10

_encode = json.JSONEncoder(ensure_ascii=False, allow_nan=False, default=str).encode
_encode_with_nan = json.JSONEncoder(ensure_ascii=False, default=str).encode


def find_column(
    columns: Sequence[str], asked: str | None, usual: Sequence[str], what: str, source: str
) -> str | None:
    """The column that was asked for, else the first of the usual names that is there.

    Raises:
        SourceError: The column that was asked for is not there.
    """
    if asked is not None:
        if asked not in columns:
            raise SourceError(
                f"{source} has no column {asked} for the {what}: it has {', '.join(columns)}."
            )
        return asked
    by_lower = {column.lower(): column for column in reversed(columns)}
    return next((by_lower[name] for name in usual if name in by_lower), None)


def as_json(row: Mapping[str, Any]) -> str:
    """A row as a JSON object, without its empty values; NaN counts as empty, dates become text.

    Secrets in URLs are masked.
    """
    kept = {name: value for name, value in row.items() if value is not None}
    try:
        text = _encode(kept)
    except ValueError:  # NaN or infinity somewhere
        finite = json.loads(_encode_with_nan(kept), parse_constant=lambda _: None)
        text = _encode({name: value for name, value in finite.items() if value is not None})
    if may_hold_secrets(text):  # such as signed URLs
        text = _encode(redact_value(json.loads(text)))
    return text if is_text(text) else json.dumps(json.loads(text))


def bounded_rows(batches: Iterable[pa.RecordBatch], uri: str) -> Iterator[dict[str, Any]]:
    """Rows of a Parquet file as Python values, a few at a time: a few compressed bytes, or a value
    that many rows share, may stand for gigabytes.

    Raises:
        SourceError: A row is larger than `METADATA_LIMIT`.
    """
    number = 0
    for batch in batches:
        small = batch.nbytes <= METADATA_LIMIT
        for start in range(0, len(batch), len(batch) if small else 1):
            rows = batch.slice(start, len(batch) if small else 1)
            number += len(rows)
            if not small and rows.nbytes > METADATA_LIMIT:
                raise SourceError(
                    f"Table {uri}: row {number} holds more than {METADATA_LIMIT >> 20} MiB beside "
                    "audio: shorten or remove it."
                )
            yield from rows.to_pylist()


def refuse_bombs(table: Any, columns: Sequence[str], uri: str) -> None:
    """Refuse a Parquet file whose footer says that a few bytes become very many: Arrow takes a page
    out of its compression as a whole.

    Raises:
        SourceError: It does, in one of the columns.
    """
    for group in range(table.metadata.num_row_groups):
        about = table.metadata.row_group(group)
        for number in range(about.num_columns):
            chunk = about.column(number)
            size, packed = chunk.total_uncompressed_size, max(chunk.total_compressed_size, 1)
            name = chunk.path_in_schema
            read = any(name == one or name.startswith(f"{one}.") for one in columns)
            if read and size > _LARGE and size > _MOST_COMPRESSED * packed:
                raise SourceError(
                    f"Table {uri}: {packed} bytes of column {name} would become {size >> 20} MiB: "
                    "remove the column, or write the file with smaller row groups."
                )


def is_text(value: str) -> bool:
    """Whether a string can be written: JSON's escapes may hold half a surrogate pair."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def is_binary(kind: pa.DataType) -> bool:
    """Whether values of a column are bytes."""
    return bool(
        pa.types.is_binary(kind)
        or pa.types.is_large_binary(kind)
        or pa.types.is_fixed_size_binary(kind)
        or pa.types.is_binary_view(kind)
    )


def is_audio(kind: pa.DataType) -> bool:
    """Whether a column is of the Hugging Face `Audio` kind: a struct of bytes and path."""
    if not pa.types.is_struct(kind):
        return False
    fields = {kind.field(index).name: kind.field(index).type for index in range(kind.num_fields)}
    return "bytes" in fields and is_binary(fields["bytes"])


def plain_columns(schema: pa.Schema) -> list[str]:
    """The columns that can be metadata, as Parquet names them: no bytes, at any depth."""
    return [name for field in schema for name in _plain(field.name, field.type)]


def _plain(name: str, kind: pa.DataType) -> list[str]:
    if pa.types.is_struct(kind):
        fields = [kind.field(index) for index in range(kind.num_fields)]
        return [part for field in fields for part in _plain(f"{name}.{field.name}", field.type)]
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return [name] if _plain(name, kind.value_type) == [name] else []
    return [] if is_binary(kind) else [name]
