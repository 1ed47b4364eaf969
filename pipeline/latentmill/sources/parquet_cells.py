"""Reads audio from Parquet: each row group once per unit, whatever the order of the items.

A cell cannot be read alone, because its whole page must be decompressed. So one pass over a row
group reads all cells that a unit needs. Each load thread advances the pass to its cell and keeps
the cells of other items on the way: up to a limit in memory, the rest in a temporary file.
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
"""The number of a row and its audio: None if the cell is empty, an ItemError if it is invalid."""

OPEN_PASSES = 4
"""Maximum number of row groups that are read at the same time."""

KEPT_LIMIT = 64 << 20
"""Maximum bytes of cells that are kept in memory, per row group."""

_PIECE = 1 << 20  # bytes of a column chunk read at a time, instead of all of it
_ROWS = 8  # rows converted at a time: a page may contain hundreds of megabytes


class CellReader:
    """The Parquet cells of a unit's items. Thread-safe; `close` it."""

    def __init__(self, items: Iterable[Item]) -> None:
        self._needed: dict[tuple[str, int, str], set[int]] = {}
        for item in items:
            if isinstance(item.place, TableCell):
                self._needed.setdefault(_group(item.uri, item.place), set()).add(item.place.row)
        self._passes: OrderedDict[tuple[str, int, str], _Pass] = OrderedDict()
        self._lock = threading.Lock()

    def read(self, uri: str, cell: TableCell) -> bytes:
        """The bytes of a cell.

        Raises ItemError if the cell is empty or does not exist, and OSError or other errors of
        pyarrow and the storage.
        """
        return retrying(lambda: self._read(_group(uri, cell), cell.row))

    def close(self) -> None:
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
                self._passes[group] = _Pass(*group, self._needed.get(group, set()))
            self._passes.move_to_end(group)
            evicted = None
            if len(self._passes) > OPEN_PASSES:
                _, evicted = self._passes.popitem(last=False)
            found = self._passes[group]
        if evicted is not None:
            evicted.close()
        return found


class _Closed(Exception):  # noqa: N818
    """The pass was closed to stay within `OPEN_PASSES`; the caller starts a new one."""


class _Pass:
    """One pass over a row group's column."""

    def __init__(self, uri: str, row_group: int, column: str, needed: set[int]) -> None:
        self._uri, self._row_group, self._column = uri, row_group, column
        self._needed = needed
        self._lock = threading.Lock()
        self._stack = contextlib.ExitStack()
        self._cells: Iterator[Cell] | None = None
        self._rows = 0
        self._kept: dict[int, bytes | ItemError | tuple[int, int] | None] = {}
        self._in_memory = 0
        self._spool: IO[bytes] | None = None
        self._closed = False

    def read(self, row: int) -> bytes:
        with self._lock:
            if self._closed:
                raise _Closed
            self._needed.add(row)
            data = self._take(row) if row in self._kept else self._advance(row)
            self._needed.discard(row)
        if data is None:
            raise ItemError("the cell contains no audio")
        if isinstance(data, ItemError):
            raise data
        return data

    def close(self) -> None:
        with self._lock:
            self._closed = True
            self._stack.close()

    def _advance(self, row: int) -> bytes | ItemError | None:
        """Read up to a row, and keep the cells of other items on the way."""
        fresh = self._cells is None
        if self._cells is None:
            self._cells = self._begin()
        if row >= self._rows:
            raise ItemError(f"row group {self._row_group} has {self._rows} rows, but no row {row}")
        for number, data in self._cells:
            if number == row:
                return data
            if number in self._needed:
                self._keep(number, data)
        self._cells = None  # the row is behind the pass, or the pass stopped at an error
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
        return self._needed_cells(batches, column)

    def _needed_cells(self, batches: Iterator[Any], column: AudioColumn) -> Iterator[Cell]:
        number = 0
        for batch in batches:
            for row in range(len(batch)):
                data: bytes | ItemError | None = None
                if number in self._needed:
                    try:
                        data = column.read(batch, row)
                    except ItemError as error:  # only this cell is invalid
                        data = error
                yield number, data
                number += 1

    def _keep(self, row: int, data: bytes | ItemError | None) -> None:
        size = len(data) if isinstance(data, bytes) else 0
        if not isinstance(data, bytes) or self._in_memory + size <= KEPT_LIMIT:
            self._kept[row] = data
            self._in_memory += size
            return
        if self._spool is None:
            self._spool = self._stack.enter_context(tempfile.TemporaryFile())  # noqa: SIM115
        self._spool.seek(0, 2)
        self._kept[row] = (self._spool.tell(), len(data))
        self._spool.write(data)

    def _take(self, row: int) -> bytes | ItemError | None:
        found = self._kept.pop(row)
        if not isinstance(found, tuple):
            self._in_memory -= len(found) if isinstance(found, bytes) else 0
            return found
        assert self._spool is not None
        self._spool.seek(found[0])
        return self._spool.read(found[1])


@contextlib.contextmanager
def open_table(uri: str) -> Iterator[Any]:
    """Open a Parquet file that reads its column chunks piece by piece.

    Raises OSError and other errors of pyarrow and the storage.
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
