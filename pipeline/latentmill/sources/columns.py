"""Rows of a table as metadata: plain JSON values, whatever the table's types are."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa

from latentmill.errors import SourceError
from latentmill.text.redact import may_hold_secrets, redact_value

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
