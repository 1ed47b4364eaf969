"""Reading the columns of a Parquet shard other than the latents."""

from __future__ import annotations

import bisect
import contextlib
import io
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from latentmill.encoding.stored import parse_json
from latentmill.errors import DamagedShardError, restore_hint
from latentmill.storage.ranged import RangedFile
from latentmill.storage.storage import Storage
from latentmill.store.schema import FIELD_NAMES, RECORD_SCHEMA

PREFIXED = ("key", "group")  # fields with a prefix in a view whose bases have one
_CACHED_BYTES = 64 << 20  # of fields; items that are neighbours by key can be in many shards
_MAX_GAP = 1 << 14  # bytes between two columns up to which one request reads both and the gap


def read_columns(storage: Storage, path: str, names: Sequence[str]) -> pa.Table:
    """Read some columns of a Parquet shard; a column that the shard does not have is null.

    In a remote shard, the columns are small pieces between the latents. All are read in one round
    of requests, because reading piece by piece with read-ahead would fetch most of the latents.

    Raises:
        ArrowException: The shard is damaged.
        StorageError: The shard cannot be read.
    """
    with storage.open(path) as file, _invalid_if_damaged():
        source: Any = file
        footer = pq.read_metadata(file)
        if storage.local:
            source = storage.full(path)  # pyarrow reads five times as fast by path
        else:
            spans = _spans(footer, names)
            found = storage.read_ranges([(path, first, last - first) for first, last in spans])
            read = _cached_read(file, [first for first, _ in spans], found)
            source = RangedFile(file.seek(0, io.SEEK_END), read)
        with pq.ParquetFile(
            source, metadata=footer, page_checksum_verification=True, pre_buffer=False
        ) as parquet:
            # Arrow's threads may abort a process that exits soon after they started.
            table = parquet.read(columns=list(names), use_threads=False)
    for name in names:  # stores of earlier versions have fewer columns
        if name not in table.column_names:
            field = RECORD_SCHEMA.field(name).with_nullable(True)
            table = table.append_column(field, pa.nulls(len(table), field.type))
    return with_prefix(table.select(names), storage.key_prefix(path)).combine_chunks()


@contextlib.contextmanager
def _invalid_if_damaged() -> Iterator[None]:
    """Raise ArrowInvalid for damage that pyarrow reports as an OSError, which has no number."""
    try:
        yield
    except OSError as error:
        if error.errno is not None:
            raise
        raise pa.ArrowInvalid(str(error)) from error


def with_prefix(table: pa.Table, prefix: str) -> pa.Table:
    """Fields with a prefix before the keys and groups; see `Storage.key_prefix`."""
    for number, field in enumerate(table.schema):
        if prefix and field.name in PREFIXED:
            values = [value and prefix + value for value in table[field.name].to_pylist()]
            table = table.set_column(number, field, pa.array(values, pa.string()))
    return table


def parse_member(storage: Storage, path: str, data: bytes) -> dict[str, Any]:
    """The fields of a record in the JSON of a tar, with the prefix of its key and group.

    Raises ValueError, TypeError or AttributeError if they are damaged.
    """
    fields: dict[str, Any] = parse_json(data)
    prefix = storage.key_prefix(path)
    if not prefix:
        return fields
    return {n: prefix + v if v and n in PREFIXED else v for n, v in fields.items()}


def damaged_shard(storage: Storage, path: str) -> DamagedShardError:
    """The error for a shard whose columns cannot be read."""
    return DamagedShardError(
        f"{storage.named(path)} is damaged: its columns cannot be read; "
        f"{restore_hint('the shard')}."
    )


class ShardFields:
    """The fields of records except the latents; keeps those of the Parquet shards used last.

    Thread-safe. Copies and pickles have read nothing yet.
    """

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self._tables: OrderedDict[str, pa.Table] = OrderedDict()
        self._lock = threading.Lock()  # guards the tables

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return ShardFields, (self._storage,)

    def row(self, shard: str, row: int) -> dict[str, Any]:
        """Return the fields of one row of a shard."""
        fields: dict[str, Any]
        (fields,) = self._table(shard).slice(row, 1).to_pylist()
        return fields

    def _table(self, shard: str) -> pa.Table:
        tables = self._tables
        with self._lock:
            if shard in tables:
                tables.move_to_end(shard)  # the last one is the most recently used
                return tables[shard]
        # Without the lock, so that threads read at the same time.
        table = read_columns(self._storage, shard, FIELD_NAMES)
        with self._lock:
            tables[shard] = table
            while len(tables) > 1 and sum(one.nbytes for one in tables.values()) > _CACHED_BYTES:
                tables.popitem(last=False)
        return table

    def clear(self) -> None:
        with self._lock:
            self._tables.clear()


def _spans(footer: Any, names: Sequence[str]) -> list[tuple[int, int]]:
    """Byte ranges (start, end) that contain the columns; end is exclusive."""
    spans: list[tuple[int, int]] = []
    for group in map(footer.row_group, range(footer.num_row_groups)):
        for column in map(group.column, range(group.num_columns)):
            if column.path_in_schema.partition(".")[0] in names:
                first = column.dictionary_page_offset or column.data_page_offset
                last = first + column.total_compressed_size
                if spans and first - spans[-1][1] <= _MAX_GAP:
                    first = spans.pop()[0]
                spans.append((first, last))
    return spans


def _cached_read(
    file: BinaryIO, starts: Sequence[int], parts: Sequence[bytes]
) -> Callable[[int, int], bytes]:
    """Return a function that reads a file, using the parts of it that are in memory."""

    def read(at: int, length: int) -> bytes:
        part = bisect.bisect_right(starts, at) - 1
        inside = at - starts[part] if part >= 0 else 0
        if part >= 0 and inside < len(parts[part]):
            return parts[part][inside : inside + length]
        file.seek(at)
        return file.read(length)

    return read
