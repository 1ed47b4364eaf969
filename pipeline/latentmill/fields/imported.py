"""Imported values of a field: a Parquet or JSONL file with keys, or a folder of .npy files.

A value of one dimension is a vector. One of two dimensions `[n, D]` is a row of tokens.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.lib.format import open_memmap

from latentmill.errors import SourceError
from latentmill.fields.import_table import Imported, ImportTable, hash_of
from latentmill.fields.inputs import Absent, Input, absent_items
from latentmill.models.embedder import EmbedderSpec
from latentmill.plan import Unit
from latentmill.record import FloatArray
from latentmill.sources.names import as_key
from latentmill.storage.remote import open_filesystem, storage_errors
from latentmill.store.npy import BAD_HEADER
from latentmill.store.schema import Commit, as_text
from latentmill.text.redact import redact

KEYS = ("key", "id")
SUFFIXES = (".parquet", ".jsonl")
_BUFFER = 1 << 20  # bytes of a file that are read at a time
_ROWS, _VALUE_BYTES = 1024, 8 << 20  # of a Parquet file that are in memory at a time, at most
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
        """Read the file, or all files of the folder, once.

        The values of a file are then in a temporary file on disk; see `ImportTable`.

        Raises:
            SourceError: It cannot be read, or has no keys or values.
            StorageError: The folder for temporary files is full.
        """
        self._source = source
        self.name = redact(source.rstrip("/")).rpartition("/")[2]
        self._table = ImportTable()
        try:
            if source.lower().endswith(SUFFIXES):
                fs, path = open_filesystem(source)
                with fs.open(path, "rb") as file:
                    parquet = source.lower().endswith(".parquet")
                    rows = _parquet(file, field) if parquet else _jsonl(file, field)
                    self._table.add((key, value, None) for key, value in rows)
            else:
                self._table.add(_folder(Path(source)))
            first = self._first()
        except (*_UNREADABLE, *storage_errors()) as error:
            raise SourceError(f"Cannot import {redact(source)}: {error}.") from error
        self._dimensions, self._ndim = first.dimensions, first.ndim
        kind: Any = "vector" if first.ndim == 1 else "tokens"
        self.model = Unchanged(EmbedderSpec("file", kind, "latents", self._dimensions))

    def unknown(self, keys: Iterable[str], most: int) -> tuple[int, list[str]]:
        """The number of its keys that are not among `keys`, and the first of them."""
        return self._table.unknown(keys, most)

    def _first(self) -> Imported:
        """The first value that can be used, whose shape the others must have."""
        if (first := self._table.first()) is not None:
            return first
        wrong = self._table.first_wrong()
        raise ValueError(
            f"the value of {wrong.key}: {wrong.wrong}" if wrong else "it has no values"
        )

    def of(self, unit: Unit, base: Commit | None, known: Commit | None) -> Mapping[str, Input]:
        del unit, known
        if base is None:
            return {}
        absent, found = absent_items(base), self._table.find([one.key for one in base.items])
        return {
            one.key: absent.get(one.key) or self._input(found.get(one.key)) for one in base.items
        }

    def read(self, base: Commit, keys: Sequence[str]) -> Iterator[FloatArray]:
        del base
        found = self._table.find(list(keys))
        for key in keys:
            path = found[key].path
            if path is None:
                array = self._table.value(key)
            else:
                array = self._read_again(Path(path), found[key])
            yield np.ascontiguousarray(array.reshape(-1, self._dimensions).T)

    def _read_again(self, path: Path, found: Imported) -> FloatArray:
        """The value of a file that was read before; SourceError if it is another one now."""
        array = _or_reason(_of_file, path)
        if isinstance(array, str) or hash_of(array) != found.hash:
            raise SourceError(f"{path} was changed while it was imported: run the command again.")
        return array

    def _input(self, found: Imported | None) -> Input:
        if found is None:
            return Absent(f"{self.name} has no value of it")
        if found.wrong is not None or found.hash is None:
            return Absent(f"its value in {self.name} cannot be read: {found.wrong}")
        if (found.ndim, found.dimensions) != (self._ndim, self._dimensions):
            form, first = _form(found.ndim, found.dimensions), _form(self._ndim, self._dimensions)
            return Absent(f"its value in {self.name} is {form}, but the first one is {first}")
        return found.hash


def _form(ndim: int, dimensions: int) -> str:
    return f"{'a vector' if ndim == 1 else 'tokens'} of {dimensions} numbers"


def _folder(folder: Path) -> Iterator[tuple[str, FloatArray | str, str]]:
    """Keys, values and paths of the .npy files; a text for a value says what is wrong with it."""
    for file in sorted(folder.rglob("*.npy")):
        key = as_key(file.relative_to(folder).with_suffix("").as_posix())
        yield key, _or_reason(_of_file, file), str(file)


def _of_file(file: Path) -> FloatArray:
    try:
        mapped = open_memmap(file, mode="r")  # type: ignore[no-untyped-call]
    except BAD_HEADER as error:
        raise ValueError("its header is damaged") from error
    return _checked(np.array(mapped))


def _parquet(file: Any, field: str) -> Iterator[tuple[str, FloatArray | str]]:
    """Keys and values; a text instead of a value says what is wrong with it."""
    parquet = pq.ParquetFile(file, buffer_size=_BUFFER, pre_buffer=False)
    key, value = _columns(parquet.schema_arrow.names, field)
    kind, depth = parquet.schema_arrow.field(value).type, 0
    while pa.types.is_nested(kind) and hasattr(kind, "value_type"):
        kind, depth = kind.value_type, depth + 1
    if depth not in (1, 2) or not (pa.types.is_integer(kind) or pa.types.is_floating(kind)):
        found = parquet.schema_arrow.field(value).type
        raise ValueError(
            f"its column {value} is {found}, but must be lists of numbers, or lists of such lists"
        )
    rows = _rows_at_once(parquet.metadata, value, kind.bit_width // 8)
    for batch in parquet.iter_batches(rows, columns=[key, value], use_threads=False):
        for name, scalar in zip(batch[key], batch[value], strict=True):
            if name.is_valid and scalar.is_valid:
                yield as_key(str(name.as_py())), _or_reason(_of_list, scalar.values)


def _rows_at_once(footer: pq.FileMetaData, column: str, width: int) -> int:
    """The number of rows that are read together, by the values of a row in any row group."""
    largest = 1.0
    for number in range(footer.num_row_groups):
        group = footer.row_group(number)
        for chunk in map(group.column, range(group.num_columns)):
            if chunk.path_in_schema.startswith(f"{column}."):
                largest = max(largest, chunk.num_values * width / max(group.num_rows, 1))
    return max(1, min(_ROWS, int(_VALUE_BYTES / largest)))


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
    except (*_UNREADABLE, OSError) as error:
        return as_text(str(error))


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
