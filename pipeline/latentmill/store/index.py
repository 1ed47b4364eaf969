"""Where every record of a store lies: from the commits, or from a sealed store's index file.

The file is an Arrow IPC table sorted by key, which a reader maps into memory: millions of items
cost it a few megabytes.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import xxhash

from latentmill.errors import StoreError
from latentmill.storage.storage import Storage, file_in_store
from latentmill.store.schema import Commit

# A larger index is mapped without being read whole: opening a store stays quick.
CHECKED_BYTES = 64 << 20

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
    """One record's place: its shard and row, its latent's bytes, hash and shape."""

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
        """The latent's shape: `[channels, frames]`, or with chunks in front."""
        stitched = (self.channels, self.frames)
        return (self.chunks, *stitched) if self.chunks else stitched


def entries(commit: Commit) -> Iterator[IndexEntry]:
    """The places of a commit's records, in the order of the shard's rows."""
    encoded = (item for item in commit.items if item.status == "encoded")
    for row, item in enumerate(encoded):
        assert item.shape is not None and item.hash is not None and commit.shard is not None
        assert item.offset is not None and item.length is not None
        yield IndexEntry(
            key=item.key,
            shard=commit.shard,
            row=row,
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
    """The places of a commit's records, as rows of the index."""
    return pa.RecordBatch.from_pylist([vars(entry) for entry in entries(commit)], INDEX_SCHEMA)


@contextlib.contextmanager
def _reading(where: str) -> Iterator[None]:
    try:
        yield
    except _DAMAGES as error:
        raise damaged_index(where) from error


def damaged_index(where: str) -> StoreError:
    """What to tell of an index that is missing or not what it should be."""
    return StoreError(
        f"{where} is missing or damaged: run the same encode command again to write it again."
    )


# What Arrow and Python raise for an index file that is not what it should be.
_DAMAGES = (OSError, ValueError, TypeError, LookupError, pa.ArrowException)


class Index:
    """The records of a store by key.

    Every method of one that was read from a file raises StoreError where the file turns out to be
    damaged: opening a large one looks at no row.
    """

    def __init__(self, table: pa.Table, where: str = "the index") -> None:
        self._where = where
        self._table = table.unify_dictionaries().combine_chunks()
        names = INDEX_SCHEMA.names if len(table) else []
        self._columns = {name: self._table[name].chunk(0) for name in names}

    @classmethod
    def from_commits(cls, commits: Iterable[Commit]) -> Index:
        """Gather the index from commits, one at a time."""
        return cls.from_batches([to_batch(commit) for commit in commits])

    @classmethod
    def from_batches(cls, batches: Sequence[pa.RecordBatch]) -> Index:
        """Gather the index from what `to_batch` made of the commits."""
        table = pa.Table.from_batches(batches, INDEX_SCHEMA)
        # Arrow sorts by UTF-8 bytes, which is Python's order of strings.
        return cls(table.unify_dictionaries().combine_chunks().sort_by("key"))

    @classmethod
    def from_file(
        cls, source: pa.Buffer | bytes, where: str = "the index", *, whole: bool = True
    ) -> Index:
        """Open an index file.

        Args:
            source: Its bytes.
            where: Its name, for messages.
            whole: Whether to look at every row, which takes time in proportion.

        Raises:
            StoreError: It is not an Arrow file with these columns, or names a shard outside of the
                store.
        """
        with _reading(where):
            buffer = pa.py_buffer(source)
            if buffer.size < 8 or buffer.slice(0, 6).to_pybytes() != b"ARROW1":
                raise ValueError("not an Arrow file")
            # The file's stream, without its footer: reading that hands over to a thread of Arrow's
            # and back, which costs milliseconds on a busy machine.
            table = pa.ipc.open_stream(buffer.slice(8)).read_all()
            if not table.schema.equals(INDEX_SCHEMA):
                raise ValueError("other columns")
            # Arrow trusts what it does not check, as far as the end of the process.
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
                    f"The index names a shard outside of the store, {error}: do not use this "
                    "store, or restore the file from a copy."
                ) from error
        return index

    @cached_property
    def items_hash(self) -> str:
        """A hash of all keys, shapes and lengths, wherever the records lie."""
        digest = xxhash.xxh3_128()
        with _reading(self._where):
            if len(self):
                column = self._columns["key"]
                _, offsets, data = column.buffers()
                ends = np.frombuffer(offsets, np.int32)[column.offset :][: len(self) + 1]
                digest.update((ends - ends[0]).tobytes())
                digest.update(data.slice(int(ends[0]), int(ends[-1] - ends[0])))
            for name in ("chunks", "channels", "frames", "num_samples"):
                digest.update(self.column(name).tobytes())
        return digest.hexdigest()

    def to_bytes(self) -> bytes:
        """The index file's content."""
        buffer = io.BytesIO()
        with pa.ipc.new_file(buffer, self._table.schema) as file:
            file.write_table(self._table)
        return buffer.getvalue()

    def __len__(self) -> int:
        return len(self._table)

    def column(self, name: str) -> npt.NDArray[np.int64]:
        """A column of numbers for all records, in the order of the keys; views of the file.

        Of `shard` the numbers into `shards`.
        """
        if not len(self):
            return np.zeros(0, np.int64)
        with _reading(self._where):
            column = self._columns[name]
            numbers = column.indices if name == "shard" else column
            values: npt.NDArray[np.int64] = numbers.to_numpy()
            if name == "shard" and not 0 <= values.min() <= values.max() < len(column.dictionary):
                raise ValueError("a shard that is not listed")
            return values

    @property
    def shards(self) -> list[str]:
        """The paths of the shards, numbered as in `column("shard")`."""
        with _reading(self._where):
            return self._columns["shard"].dictionary.to_pylist() if self else []

    def key(self, position: int) -> str:
        """The key at a position of the sorted keys."""
        with _reading(self._where):
            column = self._columns["key"]
            _, offsets, data = column.buffers()
            ends = np.frombuffer(offsets, np.int32)[column.offset :]
            start, end = int(ends[position]), int(ends[position + 1])
            if not 0 <= start <= end <= data.size:
                raise ValueError("a key that is not there")
            return str(data.slice(start, end - start).to_pybytes(), "utf-8")

    def find(self, key: str) -> int | None:
        """The position of a key, by bisection; None if there is no such record."""
        low, high = 0, len(self)
        while low < high:
            middle = (low + high) // 2
            if self.key(middle) < key:
                low = middle + 1
            else:
                high = middle
        return low if low < len(self) and self.key(low) == key else None

    def entry(self, position: int) -> IndexEntry:
        """The entry at a position."""
        with _reading(self._where):
            key, columns = self.key(position), self._columns.items()
            values = {name: c[position].as_py() for name, c in columns if name != "key"}
            entry = IndexEntry(key, **values)
            count = entry.channels * entry.frames * (entry.chunks or 1)
            if min(entry.offset, entry.chunks) < 0 or entry.length not in (2 * count, 4 * count):
                raise ValueError("a place that does not fit its shape")
            return entry


def open_index(storage: Storage, path: str, wanted: str | None) -> Index:
    """Open the index of a sealed store: a local one is mapped; one that is small is checked whole.

    Args:
        storage: The store.
        path: The index in it.
        wanted: Its hash by the seal, if the seal has one.

    Raises:
        StoreError: It is damaged.
        FileNotFoundError, StorageError: It cannot be read.
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
