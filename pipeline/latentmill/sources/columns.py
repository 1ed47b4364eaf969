"""Converts rows of tables to metadata: JSON values, whatever the types of the columns."""

from __future__ import annotations

import json
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa

from latentmill.errors import SourceError
from latentmill.text.redact import may_hold_secrets, redact_value

ROWS = 64
"""Rows of metadata that are read at a time."""

METADATA_LIMIT = 16 << 20
"""Maximum bytes of a sidecar or of a row of a table."""

_LARGE = 128 << 20
_MAX_COMPRESSION = 100  # ratio; text reaches 10

_JSON: dict[str, Any] = {"ensure_ascii": False, "check_circular": False, "default": str}
_encode = json.JSONEncoder(allow_nan=False, **_JSON).encode
_encode_with_nan = json.JSONEncoder(**_JSON).encode


def find_column(
    columns: Sequence[str], requested: str | None, usual: Sequence[str], what: str, source: str
) -> str | None:
    """The column `requested` by the user, or else the first column with one of the `usual` names.

    Raises SourceError if the table has no column `requested`.
    """
    if requested is not None:
        if requested not in columns:
            raise SourceError(
                f"{source} has no {what} column {requested}: choose one of {', '.join(columns)}."
            )
        return requested
    by_lower = {column.lower(): column for column in reversed(columns)}
    return next((by_lower[name] for name in usual if name in by_lower), None)


def as_json(row: Mapping[str, Any], skipped: Container[str] = ()) -> str:
    """A row as a JSON object without null and NaN values and `skipped` columns.

    Dates become text, and secrets in URLs are masked.
    """
    kept = {name: value for name, value in row.items() if value is not None and name not in skipped}
    try:
        text = _encode(kept)
    except ValueError:  # NaN or infinity somewhere
        finite = json.loads(_encode_with_nan(kept), parse_constant=lambda _: None)
        text = _encode({name: value for name, value in finite.items() if value is not None})
    if may_hold_secrets(text):  # such as signed URLs
        text = _encode(redact_value(json.loads(text)))
    return text if is_text(text) else json.dumps(json.loads(text))


def bounded_rows(batches: Iterable[pa.RecordBatch], uri: str) -> Iterator[dict[str, Any]]:
    """Rows of a Parquet file as Python values, in bounded memory.

    A few compressed bytes, or a value that many rows share, may expand to gigabytes. Raises
    SourceError if a row is larger than `METADATA_LIMIT`.
    """
    number = 0
    for batch in batches:
        small = batch.nbytes <= METADATA_LIMIT
        for start in range(0, len(batch), len(batch) if small else 1):
            rows = batch.slice(start, len(batch) if small else 1)
            number += len(rows)
            if not small and rows.nbytes > METADATA_LIMIT:
                raise SourceError(
                    f"Table {uri}: the metadata of row {number} exceeds {METADATA_LIMIT >> 20} "
                    "MiB: shorten or remove it."
                )
            yield from rows.to_pylist()


def refuse_bombs(table: Any, columns: Sequence[str], uri: str) -> None:
    """Raise SourceError if one of the columns is extremely compressed according to the footer.

    Arrow decompresses whole pages, so a small file could fill the memory.
    """
    for group in range(table.metadata.num_row_groups):
        about = table.metadata.row_group(group)
        for number in range(about.num_columns):
            chunk = about.column(number)
            size, packed = chunk.total_uncompressed_size, max(chunk.total_compressed_size, 1)
            name = chunk.path_in_schema
            read = any(name == one or name.startswith(f"{one}.") for one in columns)
            if read and size > _LARGE and size > _MAX_COMPRESSION * packed:
                raise SourceError(
                    f"Table {uri}: {packed} bytes of column {name} decompress to {size >> 20} MiB: "
                    "remove the column, or write the file with smaller row groups."
                )


def is_text(value: str) -> bool:
    """Whether a string can be encoded as UTF-8: JSON escapes may contain half a surrogate pair."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def is_binary(kind: pa.DataType) -> bool:
    """Whether the values of a column are bytes."""
    return bool(
        pa.types.is_binary(kind)
        or pa.types.is_large_binary(kind)
        or pa.types.is_fixed_size_binary(kind)
        or pa.types.is_binary_view(kind)
    )


def is_audio(kind: pa.DataType) -> bool:
    """Whether a column is a Hugging Face `Audio` column: a struct of bytes and path."""
    fields = struct_fields(kind)
    return "bytes" in fields and is_binary(fields["bytes"])


def struct_fields(kind: pa.DataType) -> dict[str, pa.DataType]:
    """Names and types of the fields of a struct; empty for other types."""
    if not pa.types.is_struct(kind):
        return {}
    return {kind.field(index).name: kind.field(index).type for index in range(kind.num_fields)}


def plain_columns(schema: pa.Schema) -> list[str]:
    """Names of the columns that contain no bytes at any depth, as Parquet names them."""
    return [name for field in schema for name in _plain(field.name, field.type)]


def _plain(name: str, kind: pa.DataType) -> list[str]:
    if pa.types.is_struct(kind):
        fields = struct_fields(kind)
        return [part for field in fields for part in _plain(f"{name}.{field}", fields[field])]
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return [name] if _plain(name, kind.value_type) == [name] else []
    return [] if is_binary(kind) else [name]
