"""The index of a store: the location of every record, from the commits or from the index file.

The index file of a sealed store is an Arrow IPC table sorted by key. A reader maps it into memory,
so that millions of items need only a few megabytes.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import xxhash

from latentmill.errors import StoreError
from latentmill.plan.drafting import MAX_KEY_BYTES, key_bytes
from latentmill.storage.storage import Storage, file_in_store
from latentmill.store.schema import Commit

# A larger index is mapped without checking all of it, so that a store opens quickly.
CHECKED_BYTES = 64 << 20

_KEYS = 4096  # that are read at once: one by one takes forty times as long

INDEX_SCHEMA = pa.schema(
    [
        pa.field("key", pa.string(), nullable=False),
        pa.field("shard", pa.dictionary(pa.int32(), pa.string()), nullable=False),
        pa.field("row", pa.int32(), nullable=False),
        pa.field("offset", pa.int64(), nullable=False),
        pa.field("length", pa.int64(), nullable=False),
        pa.field("hash", pa.uint64(), nullable=False),
        pa.field("chunks", pa.int32(), nullable=False),  # 0 for a stitched latent
        pa.field("channels", pa.int32(), nullable=False),
        pa.field("frames", pa.int32(), nullable=False),
        pa.field("num_samples", pa.int64(), nullable=False),
        pa.field("fields_offset", pa.int64(), nullable=False),  # -1 in Parquet
        pa.field("fields_length", pa.int64(), nullable=False),
    ]
)


@dataclass(frozen=True)
class IndexEntry:
    """Location of one record: its shard and row, and the position, hash and shape of its latent."""

    key: str
    shard: str
    row: int
    offset: int
    length: int
    hash: int
    chunks: int
    channels: int
    frames: int
    num_samples: int
    fields_offset: int
    fields_length: int

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the latent: `[channels, frames]` or `[chunks, channels, frames]`."""
        stitched = (self.channels, self.frames)
        return (self.chunks, *stitched) if self.chunks else stitched


def entries(commit: Commit) -> Iterator[IndexEntry]:
    """Yield the index entries of a commit's records, in the order of the plan."""
    encoded = (item for item in commit.items if item.status == "encoded")
    for number, item in enumerate(encoded):
        assert item.shape is not None and item.hash is not None and commit.shard is not None
        assert item.offset is not None and item.length is not None
        yield IndexEntry(
            key=item.key,
            shard=commit.shard,
            row=number if item.row is None else item.row,
            offset=item.offset,
            length=item.length,
            hash=int(item.hash, 16),
            chunks=item.shape[0] if len(item.shape) == 3 else 0,
            channels=item.shape[-2],
            frames=item.shape[-1],
            num_samples=item.num_samples or 0,
            fields_offset=-1 if item.fields_offset is None else item.fields_offset,
            fields_length=-1 if item.fields_length is None else item.fields_length,
        )


def to_batch(commit: Commit) -> pa.RecordBatch:
    """Return the index entries of a commit's records as Arrow rows."""
    return pa.RecordBatch.from_pylist([vars(entry) for entry in entries(commit)], INDEX_SCHEMA)


@contextlib.contextmanager
def _reading(where: str) -> Iterator[None]:
    try:
        yield
    except _READ_ERRORS as error:
        raise damaged_index(where) from error


def damaged_index(where: str) -> StoreError:
    """The error for a missing or damaged index."""
    return StoreError(
        f"{where} is missing or damaged: run the same encode command again to recreate it."
    )


# Errors that Arrow and Python raise for a damaged index file.
_READ_ERRORS = (OSError, ValueError, TypeError, LookupError, pa.ArrowException)


class Index:
    """The locations of a store's records, by key.

    Opening a large index file does not check its rows, so any method may raise StoreError for a
    damaged file.
    """

    def __init__(self, table: pa.Table, where: str = "the index") -> None:
        self._where = where
        self._table = table.unify_dictionaries().combine_chunks()
        names = INDEX_SCHEMA.names if len(table) else []
        self._columns = {name: self._table[name].chunk(0) for name in names}

    @classmethod
    def from_batches(cls, batches: Sequence[pa.RecordBatch]) -> Index:
        """Build the index from the batches that `to_batch` returned for the commits."""
        return cls(_sorted(pa.Table.from_batches(batches, INDEX_SCHEMA)))

    @classmethod
    def from_tables(cls, tables: Sequence[pa.Table]) -> Index:
        """Build the index from rows of other indexes; lists only the shards of these rows."""
        table = _sorted(pa.concat_tables(tables))
        if not len(table):
            return cls(table)
        shards = table["shard"].chunk(0)
        used, numbers = np.unique(shards.indices.to_numpy(), return_inverse=True)
        paths = shards.dictionary.take(pa.array(used))
        numbered = pa.DictionaryArray.from_arrays(pa.array(numbers, pa.int32()), paths)
        return cls(table.set_column(1, INDEX_SCHEMA.field("shard"), numbered))

    @classmethod
    def from_file(
        cls, source: pa.Buffer | bytes, where: str = "the index", *, whole: bool = True
    ) -> Index:
        """Open an index file from its bytes; `where` is its name in messages.

        With `whole`, every row is validated, which takes longer for larger files. Raises StoreError
        if this is not an Arrow file with these columns, or refers to a shard outside of the store.
        """
        with _reading(where):
            buffer = pa.py_buffer(source)
            if buffer.size < 8 or buffer.slice(0, 6).to_pybytes() != b"ARROW1":
                raise ValueError("not an Arrow file")
            # Read it as a stream, which skips the footer: reading the footer switches to a thread
            # of Arrow and back, which takes milliseconds on a busy machine.
            table = pa.ipc.open_stream(buffer.slice(8)).read_all()
            if not table.schema.equals(INDEX_SCHEMA):
                raise ValueError("wrong columns")
            # Arrow does not check by itself, and invalid data can crash the process.
            table.validate(full=whole)
            for chunk in table["shard"].chunks:
                chunk.dictionary.validate(full=True)
            index = cls(table, where)
            shards = index.shards
        for path in shards:
            try:
                file_in_store(path)
            except ValueError as error:
                raise StoreError(
                    f"The index refers to a shard outside of the store, {error}: do not use this "
                    "store, or restore the file from a copy."
                ) from error
        return index

    @property
    def table(self) -> pa.Table:
        """All rows, as `INDEX_SCHEMA`."""
        return self._table

    @cached_property
    def items_hash(self) -> str:
        """Hash of all keys, shapes and lengths; does not depend on where the records are stored."""
        digest = xxhash.xxh3_128()
        with _reading(self._where):
            if len(self):
                ends, data = self._key_buffers()
                digest.update(ends.tobytes())
                digest.update(data)
            for name in ("chunks", "channels", "frames", "num_samples"):
                digest.update(self.column(name).tobytes())
        return digest.hexdigest()

    def to_bytes(self) -> bytes:
        """Return the content of the index file."""
        buffer = io.BytesIO()
        with pa.ipc.new_file(buffer, self._table.schema) as file:
            file.write_table(self._table)
        return buffer.getvalue()

    def __len__(self) -> int:
        return len(self._table)

    def column(self, name: str) -> npt.NDArray[np.int64]:
        """A numeric column for all records, in key order, as a view of the file.

        For `shard`, the values are indices into `shards`.
        """
        if not len(self):
            return np.zeros(0, np.int64)
        with _reading(self._where):
            column = self._columns[name]
            numbers = column.indices if name == "shard" else column
            values: npt.NDArray[np.int64] = numbers.to_numpy()
            if name == "shard" and not 0 <= values.min() <= values.max() < len(column.dictionary):
                raise ValueError("unknown shard")
            return values

    @cached_property
    def shards(self) -> list[str]:
        """Paths of the shards; `column("shard")` has indices into this list."""
        with _reading(self._where):
            return self._columns["shard"].dictionary.to_pylist() if self else []

    def by_shard(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Positions of the records ordered by shard and row, and where each shard begins in them.

        The second array has one more number at its end: the number of records.
        """
        shards = self.column("shard")
        order = np.lexsort((self.column("row"), shards))
        return order, np.searchsorted(shards[order], np.arange(len(self.shards) + 1))

    def key(self, position: int) -> str:
        """The key at a position in the sorted keys."""
        with _reading(self._where):  # `find` calls this often; `keys` takes four times as long
            ends, data = self._key_data
            start, stop = ends[position : position + 2].tolist()
            if not 0 <= start <= stop <= data.size:
                raise ValueError("key out of range")
            return str(memoryview(data)[start:stop], "utf-8")

    def keys(self, positions: npt.NDArray[np.int64]) -> list[str]:
        """The keys at positions in the sorted keys."""
        with _reading(self._where):
            ends, data = self._key_data
            starts, stops = ends[positions], ends[positions + 1]
            if not ((starts >= 0) & (starts <= stops) & (stops <= data.size)).all():
                raise ValueError("key out of range")
            places, text = zip(starts.tolist(), stops.tolist(), strict=True), memoryview(data)
            return [str(text[start:stop], "utf-8") for start, stop in places]

    def all_keys(self) -> Iterator[str]:
        """All keys, in order, some of them in memory at a time."""
        for first in range(0, len(self), _KEYS):
            yield from self.keys(np.arange(first, min(first + _KEYS, len(self))))

    def key_array(self) -> pa.Array:
        """All keys, in order."""
        with _reading(self._where):
            keys = self._columns["key"] if len(self) else pa.array([], pa.string())
            keys.validate(full=True)
            return keys

    def has_keys(self, keys: pa.ChunkedArray) -> bool:
        """Whether these are the keys of all records, in order."""
        own = self._columns["key"] if len(self) else pa.array([], pa.string())
        return bool(pa.chunked_array([own]).equals(keys))

    def positions_of(self, other: Index) -> npt.NDArray[np.int64] | None:
        """Positions here of another index's keys, -1 for missing ones; None if keys are equal."""
        if self._has_keys_of(other):
            return None
        import pyarrow.compute as pc  # slow, and most commands do not need it

        found = pc.index_in(other.key_array(), self.key_array())
        positions: npt.NDArray[np.int64] = np.asarray(pc.fill_null(found, -1), np.int64)
        return positions

    def _has_keys_of(self, other: Index) -> bool:
        """Whether both have the same keys; compares bytes, which is much faster than strings."""
        if len(self) != len(other) or not len(self):
            return len(self) == len(other)
        with _reading(self._where):
            (ends, data), (other_ends, other_data) = self._key_buffers(), other._key_buffers()
            return np.array_equal(ends, other_ends) and bool(data.equals(other_data))

    @cached_property
    def _key_data(self) -> tuple[npt.NDArray[np.int32], pa.Buffer]:
        """Where each key ends in the bytes of all keys, and these bytes; both are unchecked."""
        column = self._columns["key"]
        _, offsets, data = column.buffers()
        return np.frombuffer(offsets, np.int32)[column.offset :], data

    def _key_buffers(self) -> tuple[npt.NDArray[np.int32], pa.Buffer]:
        """Where each key ends in their bytes, counted from the first key's start, and the bytes."""
        column = self._columns["key"]
        _, offsets, data = column.buffers()
        ends = np.frombuffer(offsets, np.int32)[column.offset :][: len(self) + 1]
        first = int(ends[0])
        return ends - first if first else ends, data.slice(first, int(ends[-1]) - first)

    def find(self, key: str) -> int | None:
        """Find the position of a key by bisection; None if there is no such record."""
        low, high = 0, len(self)
        while low < high:
            middle = (low + high) // 2
            if self.key(middle) < key:
                low = middle + 1
            else:
                high = middle
        return low if low < len(self) and self.key(low) == key else None

    def entry(self, position: int) -> IndexEntry:
        with _reading(self._where):
            key, columns = self.key(position), self._columns.items()
            values = {name: c[position].as_py() for name, c in columns if name != "key"}
            entry = IndexEntry(key, **values)
            count = entry.channels * entry.frames * (entry.chunks or 1)
            if min(entry.offset, entry.chunks) < 0 or entry.length not in (2 * count, 4 * count):
                raise ValueError("length does not match shape")
            return entry


def _sorted(table: pa.Table) -> pa.Table:
    if key_bytes(table) > MAX_KEY_BYTES:
        raise StoreError(
            f"The keys of these {len(table)} records have more than 2 GiB of text, which does not "
            "fit into the index of a store: use several stores; readers accept a list of them."
        )
    # Arrow sorts by UTF-8 bytes, which is Python's string order.
    return table.unify_dictionaries().combine_chunks().sort_by("key").combine_chunks()


def open_index(storage: Storage, path: str, wanted: str | None) -> Index:
    """Open the index of a sealed store; a local file is mapped, and a small one is fully checked.

    `wanted` is the hash in dataset.json, if it has one. Raises StoreError if the index is damaged,
    FileNotFoundError or StorageError if it cannot be read.
    """
    where = f"{storage.root}/{path}"
    if storage.local:
        try:
            data = pa.memory_map(storage.full(path)).read_buffer()
        except FileNotFoundError:
            raise
        except OSError as error:  # a folder, a link to itself, no permission
            raise damaged_index(where) from error
    else:
        data = pa.py_buffer(storage.read(path))
    small = data.size <= CHECKED_BYTES
    if wanted and small and xxhash.xxh3_128_hexdigest(data) != wanted:
        raise damaged_index(where)
    return Index.from_file(data, where, whole=small)
