"""Annotations: metadata that `latentmill annotate` adds beside the shards of a sealed store.

Each change writes a new file annotations/NNNN.parquet that contains all annotated values, sorted by
key, so a reader needs the newest only. dataset.json has its number and hash.
"""

from __future__ import annotations

import bisect
import io
import re
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from latentmill.encoding.stored import parse_json
from latentmill.errors import SourceError, StoreError
from latentmill.sources.columns import refuse_bombs
from latentmill.storage.storage import Storage
from latentmill.store.commit import write_new
from latentmill.store.entries import AnnotationEntry
from latentmill.store.schema import json_text

ANNOTATIONS = "annotations"
MAX_NAME = 64  # characters of a name that becomes a column
_FILE = re.compile(r"(\d{4,9})\.parquet")

TYPES = {"bool": pa.bool_(), "int": pa.int64(), "float": pa.float64(), "str": pa.string()}
JSON = "json"  # the kind of a name whose values are lists, objects or of several types
EXACT_INTEGERS = 2**53  # integers up to here are exact as float64
_WIDER: dict[frozenset[str | None], str] = {
    frozenset(("int", "float")): "float",
    frozenset(("int", "int large")): "int large",
}
_MARK = {b"json": b"1"}  # on the field of such a name, whose values are JSON


def is_column(name: str) -> bool:
    """Whether a name can be part of a column's name; a dot would mean a nested column."""
    return name.isprintable() and "." not in name and len(name) <= MAX_NAME


def field_of(name: str, kind: str) -> pa.Field:
    """The field of an annotated name: its kind is one of TYPES, or JSON."""
    if kind == JSON:
        return pa.field(name, pa.string(), metadata=_MARK)
    return pa.field(name, TYPES[kind])


def kind_of(field: pa.Field) -> str:
    """Inverse of `field_of`. Raises ValueError if no annotation has such a field."""
    if b"json" in (field.metadata or {}) and field.type == pa.string():
        return JSON
    for kind, type_ in TYPES.items():
        if field.type == type_:
            return kind
    raise ValueError(f"column {field.name} has the type {field.type}")


def kind_of_value(value: Any) -> str | None:
    """The kind of a scalar JSON value; `null` for None, and None for other values.

    `int large` is an integer that float64 cannot represent exactly.
    """
    if value is None:
        return "null"
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:  # half a surrogate pair
            return None
        return "str"
    if isinstance(value, int) and not isinstance(value, bool):
        return (
            ("int" if abs(value) <= EXACT_INTEGERS else "int large") if abs(value) < 2**63 else None
        )
    return type(value).__name__ if isinstance(value, bool | float) else None


def wider(known: str | None, kind: str | None) -> str | None:
    """The kind of values of two kinds; None if no scalar type contains both exactly."""
    return known if known == kind else _WIDER.get(frozenset((known, kind)))


class Annotations:
    """The annotated values of a store's records, by key.

    Keeps the columns as Arrow arrays and finds a key by bisection, so that a million records need
    little more memory than their values.
    """

    def __init__(self, table: pa.Table, where: str = "the annotations") -> None:
        """`table` has the column `key`, sorted, and a column for each name; see `field_of`."""
        self.table, self._where = table, where
        self._keys = _Keys(table["key"])
        names = table.column_names[1:]
        self.kinds = {name: kind_of(table.schema.field(name)) for name in names}
        # In chunks, because one array of texts has at most 2 GiB.
        self._columns = {name: table[name] for name in names}

    def __len__(self) -> int:
        return len(self._keys)

    def values(self, key: str) -> dict[str, Any]:
        """The annotated values of a record, by name; empty if it has none.

        Raises StoreError if a value is damaged.
        """
        wanted = key.encode()
        row = bisect.bisect_left(self._keys, wanted)
        if row == len(self._keys) or self._keys[row] != wanted:
            return {}
        found = {name: column[row].as_py() for name, column in self._columns.items()}
        return {
            name: self._parsed(value) if self.kinds[name] == JSON else value
            for name, value in found.items()
            if value is not None
        }

    def merged(self, key: str, metadata: str) -> str:
        """A record's stored metadata, as JSON, with its annotated values."""
        own = self.values(key)
        return json_text({**parse_json(metadata), **own}) if own else metadata

    def column(self, keys: Sequence[str], metadata: pa.ChunkedArray) -> pa.Array:
        """The same for the column `metadata` of many records."""
        pairs = zip(keys, metadata.to_pylist(), strict=True)
        return pa.array([self.merged(key, text) for key, text in pairs], pa.string())

    def same_as(self, other: Annotations | None) -> bool:
        """Whether other annotations have the same names, types and values."""
        if other is None:
            return not len(self)
        return self.kinds == other.kinds and bool(self.table.equals(other.table))

    def check(self) -> None:
        """Raise StoreError if a value is damaged."""
        for name, kind in self.kinds.items():
            if kind == JSON:
                for text in self.table[name].drop_null().to_pylist():
                    self._parsed(text)

    def _parsed(self, text: str) -> Any:
        try:
            return parse_json(text)
        except ValueError as error:
            raise damaged_annotations(self._where) from error


class _Keys(Sequence[bytes]):
    """Keys as UTF-8 bytes, whose order is that of the keys."""

    def __init__(self, column: pa.ChunkedArray) -> None:
        array = column.combine_chunks()
        if isinstance(array, pa.ChunkedArray):  # none, or more than 2 GiB of keys
            array = pa.concat_arrays(array.chunks or [pa.array([], pa.string())])
        self._count = len(array)
        _, offsets, data = array.buffers()
        self._data = memoryview(data or b"")
        first = 4 * array.offset
        self._ends = memoryview(offsets or b"").cast("B")[first : first + 4 * (len(array) + 1)]
        self._ends = self._ends.cast("i")

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, row: Any) -> Any:
        return bytes(self._data[self._ends[row] : self._ends[row + 1]])


def annotation_path(version: int) -> str:
    return f"{ANNOTATIONS}/{version:04d}.parquet"


def is_annotation_file(path: str) -> bool:
    """Whether a path in a store is that of a version of its annotations."""
    folder, _, name = path.rpartition("/")
    return folder == ANNOTATIONS and _FILE.fullmatch(name) is not None


def annotation_file(table: pa.Table) -> bytes:
    """The content of the file of a table; see `Annotations`."""
    buffer = io.BytesIO()
    pq.write_table(table.combine_chunks(), buffer, compression="zstd", row_group_size=1 << 16)
    return buffer.getvalue()


def annotation_entry(
    before: AnnotationEntry | None,
    data: bytes,
    annotations: Annotations,
    *,
    refreshed: bool = False,
) -> AnnotationEntry:
    """The entry in dataset.json for the file of the version after `before`."""
    version = 1 if before is None else before.version + 1
    earlier = [] if before is None else before.refreshed
    return AnnotationEntry(
        version=version,
        hashes=[*([] if before is None else before.hashes), xxhash.xxh3_128_hexdigest(data)],
        records=len(annotations),
        names=list(annotations.kinds),
        refreshed=[*earlier, version] if refreshed else earlier,
    )


def write_annotations(
    storage: Storage, before: AnnotationEntry | None, table: pa.Table, *, refreshed: bool = False
) -> tuple[AnnotationEntry, Annotations]:
    """Write the file of the version after `before`; a reader finds it once dataset.json lists it.

    `refreshed` marks a version whose new values come from the source.
    """
    data = annotation_file(table)
    path = annotation_path(1 if before is None else before.version + 1)
    annotations = parse_annotations(data, f"{storage.root}/{path}")
    write_new(storage, path, partial(storage.create, path, data))
    return annotation_entry(before, data, annotations, refreshed=refreshed), annotations


def open_annotations(
    storage: Storage, entry: AnnotationEntry, version: int | None = None
) -> Annotations:
    """Read the annotations that dataset.json lists, or an earlier version of them.

    Raises:
        StoreError: The file is missing or damaged.
        StorageError: It cannot be read.
    """
    version = entry.version if version is None else version
    data = storage.read_if_exists(annotation_path(version))
    where = f"{storage.root}/{annotation_path(version)}"
    if data is None or xxhash.xxh3_128_hexdigest(data) != entry.hashes[version - 1]:
        raise damaged_annotations(where)
    return parse_annotations(data, where)


def refreshed_versions(
    storage: Storage, entry: AnnotationEntry
) -> Iterator[tuple[Annotations | None, Annotations]]:
    """The annotations before and after each version whose new values come from the source.

    Earlier versions may be deleted. If one of the two files is missing or damaged, nobody knows
    which values are new, so the version is left out.
    """
    for version in entry.refreshed:
        if entry.hashes[version - 1] in entry.hashes[: version - 1][-1:]:
            continue  # no new values
        try:
            before = open_annotations(storage, entry, version - 1) if version > 1 else None
            after = open_annotations(storage, entry, version)
        except StoreError:
            continue
        yield before, after


def parse_annotations(data: bytes, where: str) -> Annotations:
    """Parse the file `where`, which may be anything. Raises StoreError if it is damaged."""
    try:
        with pq.ParquetFile(pa.BufferReader(data)) as file:
            refuse_bombs(file, file.schema_arrow.names, where)
            table = file.read(use_threads=False)
        table.validate(full=True)
        _check(table)
        return Annotations(table, where)
    except (pa.ArrowException, OSError, ValueError, LookupError, SourceError) as error:
        raise damaged_annotations(where) from error


def _check(table: pa.Table) -> None:
    import pyarrow.compute as pc  # slow, and most commands do not need it

    names = table.column_names
    if names[:1] != ["key"] or table["key"].type != pa.string() or table["key"].null_count:
        raise ValueError("no column of keys")
    if len(set(names)) < len(names) or not all(map(is_column, names[1:])):
        raise ValueError("invalid names of columns")
    keys = table["key"].combine_chunks()
    if len(keys) > 1 and not pc.all(pc.greater(keys[1:], keys[:-1])).as_py():
        raise ValueError("the keys are not sorted")


def damaged_annotations(where: str) -> StoreError:
    """The error for a missing or damaged file of annotations."""
    return StoreError(
        f"{where} is missing or damaged: restore it from a copy of the store, or return to an "
        "earlier version with `latentmill annotate STORE --revert --to N`."
    )


def found_annotation(storage: Storage) -> AnnotationEntry | None:
    """The entry for the files of annotations in a store that has no dataset.json.

    Earlier versions may be deleted; no file has the hash of those.
    """
    found = map(_FILE.fullmatch, storage.list(ANNOTATIONS))
    newest = max((int(name[1]) for name in found if name), default=0)
    if not newest:
        return None
    files = [storage.read_if_exists(annotation_path(n)) for n in range(1, newest + 1)]
    where = f"{storage.root}/{annotation_path(newest)}"
    annotations = parse_annotations(files[-1] or b"", where)
    return AnnotationEntry(
        version=newest,
        hashes=["" if data is None else xxhash.xxh3_128_hexdigest(data) for data in files],
        records=len(annotations),
        names=list(annotations.kinds),
        refreshed=[],
    )
