"""Imported values of a field: a Parquet or JSONL file with keys, or a folder of .npy files.

A value of one dimension is a vector. One of two dimensions `[n, D]` is a row of tokens.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

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
                    rows = _parquet(file, field) if source.endswith("t") else _jsonl(file, field)
                    for key, array in rows:
                        if key in self._arrays:
                            raise ValueError(f"it has the key {key} more than once")
                        self._arrays[key] = array
            first = next(iter(self.keys), None)
            if first is None:
                raise ValueError("it has no values")
            one = self._value(first)
        except (ValueError, TypeError, LookupError, pa.ArrowException, *storage_errors()) as error:
            raise SourceError(f"Cannot import {redact(source)}: {error}.") from error
        self._dimensions, self._ndim = int(one.shape[-1]), one.ndim
        kind: Any = "vector" if one.ndim == 1 else "tokens"
        self.model = Unchanged(EmbedderSpec("file", kind, "latents", self._dimensions))

    @property
    def keys(self) -> Mapping[str, Any]:
        return self._files or self._arrays

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
        if key not in self.keys:
            return Absent(f"{self.name} has no value of it")
        try:
            array = self._value(key)
        except (ValueError, OSError, EOFError) as error:
            return Absent(f"its value in {self.name} cannot be read: {error}")
        if array.ndim != self._ndim or array.shape[-1] != self._dimensions:
            return Absent(
                f"its value in {self.name} has the shape {list(array.shape)}, unlike the first one"
            )
        return xxhash.xxh3_64_hexdigest(repr(array.shape).encode() + array.tobytes())

    def _value(self, key: str) -> FloatArray:
        if key in self._arrays:
            return self._arrays[key]
        return _checked(np.load(self._files[key], allow_pickle=False))


def _parquet(file: Any, field: str) -> Iterator[tuple[str, FloatArray]]:
    parquet = pq.ParquetFile(file)
    key, value = _columns(parquet.schema_arrow.names, field)
    for batch in parquet.iter_batches(1024, columns=[key, value], use_threads=False):
        for name, scalar in zip(batch[key], batch[value], strict=True):
            if name.is_valid and scalar.is_valid:
                yield as_key(str(name.as_py())), _of_list(scalar.values)


def _of_list(values: pa.Array) -> FloatArray:
    if not (pa.types.is_list(values.type) or pa.types.is_fixed_size_list(values.type)):
        return _checked(values.to_numpy(zero_copy_only=False))
    return _checked(np.array([row.values.to_numpy(zero_copy_only=False) for row in values]))


def _jsonl(file: Any, field: str) -> Iterator[tuple[str, FloatArray]]:
    for line in file:
        if line.strip():
            row = json.loads(line)
            key, value = _columns(list(row), field)
            yield as_key(str(row[key])), _checked(np.array(row[value]))


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
