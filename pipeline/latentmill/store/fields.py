"""Reading the columns of a Parquet shard other than the latents."""

from __future__ import annotations

import bisect
import contextlib
import io
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, BinaryIO

import pyarrow.parquet as pq

from latentmill.storage.ranged import RangedFile
from latentmill.storage.storage import Storage
from latentmill.store.schema import RECORD_SCHEMA

_FIELD_COLUMNS = [name for name in RECORD_SCHEMA.names if name != "latent"]
_MAX_GAP = 1 << 14  # bytes between two columns up to which one request reads both and the gap


class ShardFields:
    """The columns of one Parquet shard other than the latents, read once."""

    def __init__(self, storage: Storage, path: str) -> None:
        with open_columns(storage, path, _FIELD_COLUMNS) as file:
            # Arrow's threads may abort a process that exits soon after they started.
            self._table = file.read(columns=_FIELD_COLUMNS, use_threads=False)

    def row(self, row: int) -> dict[str, Any]:
        """The fields of one row by name."""
        fields: dict[str, Any] = self._table.slice(row, 1).to_pylist()[0]
        return fields


@contextlib.contextmanager
def open_columns(storage: Storage, path: str, names: Collection[str]) -> Iterator[pq.ParquetFile]:
    """Open a Parquet shard for reading some of its columns; missing columns are ignored.

    In a remote shard, the columns are small pieces between the latents. All are read in one round
    of requests, because reading piece by piece with read-ahead would fetch most of the latents.
    """
    with storage.open(path) as file:
        source: Any = file
        footer = pq.read_metadata(file)
        if not storage.local:
            spans = _spans(footer, names)
            found = storage.read_ranges([(path, first, last - first) for first, last in spans])
            read = _cached_read(file, [first for first, _ in spans], found)
            source = RangedFile(file.seek(0, io.SEEK_END), read)
        yield pq.ParquetFile(
            source, metadata=footer, page_checksum_verification=True, pre_buffer=False
        )


def _spans(footer: Any, names: Collection[str]) -> list[tuple[int, int]]:
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
