"""Reading audio out of Parquet: each row group once per unit, whatever the order of its items.

A cell cannot be read by itself, its page must be decoded. So the cells that a unit wants of a row
group are taken in one pass over it, by whichever decode thread comes first; cells that the pass
meets before they are asked for wait, in memory while they are few, else in a temporary file.
"""

from __future__ import annotations

import contextlib
import tempfile
import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from latentmill.errors import ItemError, SourceError
from latentmill.sources.arrays import AudioColumn, audio_column
from latentmill.sources.base import Item, TableCell
from latentmill.storage.remote import open_filesystem, retrying

Cell = tuple[int, bytes | ItemError | None]
"""A row's number, and its audio: None if there is none, or why it cannot be read."""

OPEN_PASSES = 4
"""Row groups that are being read at the same time."""

WAITING_LIMIT = 64 << 20
"""Bytes of cells that wait in memory, per row group."""

_PIECE = 1 << 20  # of a column chunk, which would be read whole otherwise
_ROWS = 8  # decoded at a time: a page may hold hundreds of megabytes


class CellReader:
    """The Parquet cells of a unit's items. Thread-safe; `close` it."""

    def __init__(self, items: Iterable[Item]) -> None:
        self._wanted: dict[tuple[str, int, str], set[int]] = {}
        for item in items:
            if isinstance(item.place, TableCell):
                self._wanted.setdefault(_group(item.uri, item.place), set()).add(item.place.row)
        self._passes: OrderedDict[tuple[str, int, str], _Pass] = OrderedDict()
        self._lock = threading.Lock()

    def read(self, uri: str, cell: TableCell) -> bytes:
        """The bytes of a cell.

        Raises:
            ItemError: The cell is empty, or is not there.
            OSError: Or what else pyarrow and the storage's client raise.
        """
        return retrying(lambda: self._read(_group(uri, cell), cell.row))

    def close(self) -> None:
        """Close the files."""
        with self._lock:
            passes = list(self._passes.values())
            self._passes.clear()
        for one in passes:
            one.close()

    def _read(self, group: tuple[str, int, str], row: int) -> bytes:
        while True:
            with contextlib.suppress(_Closed):
                return self._pass(group).read(row)

    def _pass(self, group: tuple[str, int, str]) -> _Pass:
        with self._lock:
            if group not in self._passes:
                self._passes[group] = _Pass(*group, self._wanted.get(group, set()))
            self._passes.move_to_end(group)
            evicted = None
            if len(self._passes) > OPEN_PASSES:
                _, evicted = self._passes.popitem(last=False)
            found = self._passes[group]
        if evicted is not None:
            evicted.close()
        return found


class _Closed(Exception):  # noqa: N818  a pass was closed to make room: begin another
    pass


class _Pass:
    """One pass over a row group's column."""

    def __init__(self, uri: str, row_group: int, column: str, wanted: set[int]) -> None:
        self._uri, self._row_group, self._column = uri, row_group, column
        self._wanted = wanted
        self._lock = threading.Lock()
        self._stack = contextlib.ExitStack()
        self._cells: Iterator[Cell] | None = None
        self._rows = 0
        self._waiting: dict[int, bytes | ItemError | tuple[int, int] | None] = {}
        self._in_memory = 0
        self._spool: IO[bytes] | None = None
        self._closed = False

    def read(self, row: int) -> bytes:
        with self._lock:
            if self._closed:
                raise _Closed
            self._wanted.add(row)
            data = self._take(row) if row in self._waiting else self._advance(row)
            self._wanted.discard(row)
        if data is None:
            raise ItemError("the cell holds no audio")
        if isinstance(data, ItemError):
            raise data
        return data

    def close(self) -> None:
        with self._lock:
            self._closed = True
            self._stack.close()

    def _advance(self, row: int) -> bytes | ItemError | None:
        """Read on until the row comes; what others want on the way waits for them."""
        fresh = self._cells is None
        if self._cells is None:
            self._cells = self._begin()
        if row >= self._rows:
            raise ItemError(f"row group {self._row_group} has {self._rows} rows, and no row {row}")
        for number, data in self._cells:
            if number == row:
                return data
            if number in self._wanted:
                self._keep(number, data)
        self._cells = None  # asked for a second time, or reading stopped at an error
        if fresh:
            raise ItemError(f"row group {self._row_group} ends before row {row}")
        return self._advance(row)

    def _begin(self) -> Iterator[Cell]:
        file = self._stack.enter_context(open_table(self._uri))
        if self._row_group >= file.metadata.num_row_groups:
            raise ItemError(f"the file has no row group {self._row_group}")
        try:
            column = audio_column(file.schema_arrow, self._column, "its file")
        except SourceError as error:
            raise ItemError(str(error).rstrip(".")) from error
        self._rows = file.metadata.row_group(self._row_group).num_rows
        batches = file.iter_batches(
            _ROWS,
            row_groups=[self._row_group],
            columns=column.columns,
            use_threads=False,
        )
        return self._wanted_cells(batches, column)

    def _wanted_cells(self, batches: Iterator[Any], column: AudioColumn) -> Iterator[Cell]:
        number = 0
        for batch in batches:
            for row in range(len(batch)):
                data: bytes | ItemError | None = None
                if number in self._wanted:
                    try:
                        data = column.read(batch, row)
                    except ItemError as error:  # of this cell alone
                        data = error
                yield number, data
                number += 1

    def _keep(self, row: int, data: bytes | ItemError | None) -> None:
        size = len(data) if isinstance(data, bytes) else 0
        if not isinstance(data, bytes) or self._in_memory + size <= WAITING_LIMIT:
            self._waiting[row] = data
            self._in_memory += size
            return
        if self._spool is None:
            self._spool = self._stack.enter_context(tempfile.TemporaryFile())  # noqa: SIM115
        self._spool.seek(0, 2)
        self._waiting[row] = (self._spool.tell(), len(data))
        self._spool.write(data)

    def _take(self, row: int) -> bytes | ItemError | None:
        found = self._waiting.pop(row)
        if not isinstance(found, tuple):
            self._in_memory -= len(found) if isinstance(found, bytes) else 0
            return found
        assert self._spool is not None
        self._spool.seek(found[0])
        return self._spool.read(found[1])


@contextlib.contextmanager
def open_table(uri: str) -> Iterator[Any]:
    """A Parquet file, which reads its column chunks piece by piece.

    Raises:
        OSError: Or what else pyarrow and the storage's client raise.
    """
    with contextlib.ExitStack() as stack:
        if "://" in uri:
            fs, path = open_filesystem(uri)
            source = stack.enter_context(fs.open(path, "rb"))
        else:
            source = stack.enter_context(pa.OSFile(uri, "rb"))
        file = pq.ParquetFile(source, buffer_size=_PIECE, pre_buffer=False)
        stack.enter_context(contextlib.closing(file))
        yield file


def _group(uri: str, cell: TableCell) -> tuple[str, int, str]:
    return uri, cell.row_group, cell.column
