"""Imported values of a field: a Parquet or JSONL file with keys, or a folder of .npy files.

A value of one dimension is a vector. One of two dimensions `[n, D]` is a row of tokens.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash
from numpy.lib.format import open_memmap

from latentmill.errors import SourceError
from latentmill.fields.inputs import Absent, Input, absent_items
from latentmill.models.embedder import EmbedderSpec
from latentmill.plan import Unit
from latentmill.record import FloatArray
from latentmill.sources.names import as_key
from latentmill.storage.remote import open_filesystem, storage_errors
from latentmill.store.schema import Commit
from latentmill.text.redact import redact

KEYS = ("key", "id")
SUFFIXES = (".parquet", ".jsonl")
_UNREADABLE = (ValueError, TypeError, LookupError, ArithmeticError, EOFError, pa.ArrowException)


def is_import(source: str) -> bool:
    """Whether a value of `--from` is a file or a folder."""
    return source.lower().endswith(SUFFIXES) or (
        not source.startswith("metadata:") and source != "latents" and Path(source).is_dir()
    )


@dataclass(frozen=True)
class Unchanged:
    """The "model" of an imported field: the values as they are."""

    spec: EmbedderSpec

    def load(self, device: str) -> Unchanged:
        del device
        return self

    def embed(self, values: Sequence[FloatArray]) -> list[FloatArray]:
        return [np.asarray(value, np.float32) for value in values]


class ImportedValues:
    """The values of a file or folder, as `Values` of a field."""

    def __init__(self, source: str, field: str) -> None:
        """Read the file; of a folder, the names and one file.

        Raises:
            SourceError: It cannot be read, or has no keys or values.
        """
        self._source = source
        self.name = redact(source.rstrip("/")).rpartition("/")[2]
        self._arrays: dict[str, FloatArray] = {}
        self._files: dict[str, Path] = {}
        self._wrong: dict[str, str] = {}  # why a value cannot be used, by key
        try:
            if not source.lower().endswith(SUFFIXES):
                folder = Path(source)
                self._files = {
                    as_key(file.relative_to(folder).with_suffix("").as_posix()): file
                    for file in sorted(folder.rglob("*.npy"))
                }
            else:
                fs, path = open_filesystem(source)
                with fs.open(path, "rb") as file:
                    parquet = source.lower().endswith(".parquet")
                    rows = _parquet(file, field) if parquet else _jsonl(file, field)
                    for key, value in rows:
                        if key in self._arrays or key in self._wrong:
                            raise ValueError(f"it has the key {key} more than once")
                        if isinstance(value, str):
                            self._wrong[key] = value
                        else:
                            self._arrays[key] = value
            one = self._first()
        except (*_UNREADABLE, *storage_errors()) as error:
            raise SourceError(f"Cannot import {redact(source)}: {error}.") from error
        self._dimensions, self._ndim = int(one.shape[-1]), one.ndim
        kind: Any = "vector" if one.ndim == 1 else "tokens"
        self.model = Unchanged(EmbedderSpec("file", kind, "latents", self._dimensions))

    @property
    def keys(self) -> Mapping[str, Any]:
        return self._files or {**self._arrays, **self._wrong}

    def _first(self) -> FloatArray:
        """The first value that can be used, whose shape the others must have."""
        wrong = [f"the value of {key}: {why}" for key, why in self._wrong.items()]
        for key in self._files or self._arrays:
            try:
                return self._value(key)
            except (*_UNREADABLE, OSError) as error:
                wrong.append(f"the value of {key}: {error}")
        raise ValueError(wrong[0] if wrong else "it has no values")

    def of(self, unit: Unit, base: Commit | None, known: Commit | None) -> Mapping[str, Input]:
        del unit, known
        absent = absent_items(base)
        entries = () if base is None else base.items
        return {one.key: absent.get(one.key) or self._input(one.key) for one in entries}

    def read(self, base: Commit, keys: Sequence[str]) -> Iterator[FloatArray]:
        del base
        for key in keys:
            array = self._value(key)
            yield np.ascontiguousarray(array.reshape(-1, self._dimensions).T)

    def _input(self, key: str) -> Input:
        if key in self._wrong:
            return Absent(f"its value in {self.name} cannot be read: {self._wrong[key]}")
        if key not in self._files and key not in self._arrays:
            return Absent(f"{self.name} has no value of it")
        try:
            array = self._value(key)
        except (*_UNREADABLE, OSError) as error:
            return Absent(f"its value in {self.name} cannot be read: {error}")
        if array.ndim != self._ndim or array.shape[-1] != self._dimensions:
            return Absent(
                f"its value in {self.name} has the shape {list(array.shape)}, unlike the first one"
            )
        return xxhash.xxh3_64_hexdigest(repr(array.shape).encode() + array.tobytes())

    def _value(self, key: str) -> FloatArray:
        if key in self._arrays:
            return self._arrays[key]
        return _checked(np.array(open_memmap(self._files[key], mode="r")))  # type: ignore[no-untyped-call]


def _parquet(file: Any, field: str) -> Iterator[tuple[str, FloatArray | str]]:
    """Keys and values; a text instead of a value says what is wrong with it."""
    parquet = pq.ParquetFile(file)
    key, value = _columns(parquet.schema_arrow.names, field)
    kind, depth = parquet.schema_arrow.field(value).type, 0
    while pa.types.is_nested(kind) and hasattr(kind, "value_type"):
        kind, depth = kind.value_type, depth + 1
    if depth not in (1, 2) or not (pa.types.is_integer(kind) or pa.types.is_floating(kind)):
        found = parquet.schema_arrow.field(value).type
        raise ValueError(
            f"its column {value} is {found}, but must be lists of numbers, or lists of such lists"
        )
    for batch in parquet.iter_batches(1024, columns=[key, value], use_threads=False):
        for name, scalar in zip(batch[key], batch[value], strict=True):
            if name.is_valid and scalar.is_valid:
                yield as_key(str(name.as_py())), _or_reason(_of_list, scalar.values)


def _of_list(values: pa.Array) -> FloatArray:
    if not pa.types.is_nested(values.type):
        return _checked(values.to_numpy(zero_copy_only=False))
    if values.null_count:
        raise ValueError("it has tokens that are null")
    return _checked(np.array([row.values.to_numpy(zero_copy_only=False) for row in values]))


def _jsonl(file: Any, field: str) -> Iterator[tuple[str, FloatArray | str]]:
    """As `_parquet`."""
    for number, line in enumerate(file, 1):
        if line.strip():
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"line {number} is not JSON: {error}") from error
            if not isinstance(row, dict):
                raise ValueError(f"line {number} is not an object with a key and a value")
            key, value = _columns(list(row), field)
            if row[value] is not None:
                yield as_key(str(row[key])), _or_reason(_of_json, row[value])


def _of_json(value: Any) -> FloatArray:
    return _checked(np.array(value))


def _or_reason(read: Callable[[Any], FloatArray], value: Any) -> FloatArray | str:
    """The value, or why it cannot be used: one wrong value does not refuse the import."""
    try:
        return read(value)
    except _UNREADABLE as error:
        return str(error)


def _columns(names: Sequence[str], field: str) -> tuple[str, str]:
    """The columns of keys and of values: named as the field, or the only other one."""
    key = next((name for name in KEYS if name in names), None)
    if key is None:
        raise ValueError("it has no column key or id")
    others = [name for name in names if name != key]
    if field in others:
        return key, field
    if len(others) != 1:
        raise ValueError(
            f"it has the columns {', '.join(others) or 'none'} beside {key}: name the one with the "
            f"values {field}"
        )
    return key, others[0]


def _checked(array: Any) -> FloatArray:
    if array.ndim not in (1, 2) or array.dtype.kind not in "fiu" or not array.shape[-1]:
        raise ValueError("a value must be numbers in one dimension, or in two: [tokens, numbers]")
    # Whole numbers keep their type: whether the stored ones are exact is checked later.
    found: FloatArray = array if array.dtype.kind in "iu" else array.astype(np.float32)
    return found
