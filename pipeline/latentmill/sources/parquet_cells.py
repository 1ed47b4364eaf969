"""Reads audio from Parquet: each row group once per unit, whatever the order of the items.

A cell cannot be read alone, because its whole page must be decompressed. So one pass over a row
group reads all cells that a unit needs. Each load thread advances the pass to its cell and keeps
the cells of other items on the way: up to a limit in memory, the rest in a temporary file. If more
than `OPEN_PASSES` row groups are open, the cells that are still needed of one are kept before it is
closed. Only what the disk has no space for is read again.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from typing import IO, Any, TypeAlias

import pyarrow as pa
import pyarrow.parquet as pq

from latentmill.errors import ItemError, SourceError
from latentmill.sources.arrays import AudioColumn, audio_column
from latentmill.sources.base import Item, TableCell
from latentmill.storage.descriptors import read_at, write_at
from latentmill.storage.outages import ItemRetries
from latentmill.storage.remote import Retries, open_filesystem, retrying, storage_errors

Group: TypeAlias = tuple[str, int, str]
"""A table, the number of a row group and a column."""

Data: TypeAlias = bytes | ItemError | None
"""The audio of a cell: None if the cell is empty, an ItemError if it is invalid."""

OPEN_PASSES = 4
"""Maximum number of row groups that stay open, and of those that are decoded at the same time."""

KEPT_LIMIT = 256 << 20
"""Maximum bytes of cells that are kept in memory, per unit."""

DISK_RESERVE = 1 << 30
"""Bytes that stay free on the disk of the temporary file; a tenth of a smaller disk."""

_PIECE = 1 << 20  # bytes of a column chunk read at a time, instead of all of it
_ROWS = 8  # rows converted at a time: a page may contain hundreds of megabytes


class CellReader:
    """The Parquet cells of a unit's items. Thread-safe; `close` it.

    `on_bytes` is called, in any thread, whenever bytes have arrived.
    """

    def __init__(
        self, items: Iterable[Item], on_bytes: Callable[[], object] = lambda: None
    ) -> None:
        self._kept = _KeptCells()
        self._on_bytes = on_bytes
        self._decoding = threading.Semaphore(OPEN_PASSES)
        self._lock = threading.Lock()  # guards what follows
        self._groups: dict[Group, _RowGroup] = {}
        self._open: OrderedDict[Group, _RowGroup] = OrderedDict()
        for item in items:
            if isinstance(item.place, TableCell):
                self._group(_group_of(item.uri, item.place)).needed.add(item.place.row)

    def read(self, uri: str, cell: TableCell) -> bytes:
        """The bytes of a cell.

        Raises ItemError if the cell is empty or does not exist, and OSError or other errors of
        pyarrow and the storage.
        """
        name = _group_of(uri, cell)
        with self._lock:
            retries = self._group(name).retries
        return retrying(lambda: self._read(name, cell.row), retries)

    def release(self, uri: str, cell: TableCell) -> None:
        """Keep a cell no longer: its item needs no more reading."""
        with self._lock:
            group = self._groups.get(_group_of(uri, cell))
        if group is not None:
            group.release(cell.row)

    def close(self) -> None:
        with self._lock:
            for group in self._groups.values():
                group.close()
        self._kept.close()

    def _read(self, name: Group, row: int) -> bytes:
        evicted = None
        with self._lock:
            group = self._group(name)
            if not group.finished:
                self._open[name] = group
                self._open.move_to_end(name)
            if len(self._open) > OPEN_PASSES:
                _, evicted = self._open.popitem(last=False)
        if evicted is not None:
            evicted.finish()
        return group.read(row)

    def _group(self, name: Group) -> _RowGroup:
        if name not in self._groups:
            retries = ItemRetries(name[0], self._on_bytes)
            self._groups[name] = _RowGroup(name, self._kept, self._decoding, retries)
        return self._groups[name]


class _KeptCells:
    """Cells that were read before their items are loaded. Thread-safe.

    They are in memory up to `KEPT_LIMIT`, the rest in a temporary file.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._cells: dict[tuple[Group, int], Data | range] = {}  # a range of the file
        self._in_memory = 0
        self._file: IO[bytes] | None = None
        self._end = 0

    def __contains__(self, cell: tuple[Group, int]) -> bool:
        return cell in self._cells

    def add(self, cell: tuple[Group, int], data: Data) -> bool:
        """Keep a cell. False if there is no space for it."""
        size = _size(data)
        with self._lock:
            if not size or self._in_memory + size <= KEPT_LIMIT:
                self._cells[cell] = data
                self._in_memory += size
                return True
            assert isinstance(data, bytes)
            try:
                if self._file is None:
                    self._file = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115
                if not _has_space(self._file, size):
                    return False
                write_at(self._file.fileno(), data, self._end)
            except OSError:  # such as the quota of a user
                return False
            self._cells[cell] = range(self._end, self._end + size)
            self._end += size
            return True

    def pop(self, cell: tuple[Group, int]) -> Data:
        with self._lock:
            found = self._cells.pop(cell)
            if not isinstance(found, range):
                self._in_memory -= _size(found)
                return found
        assert self._file is not None
        return read_at(self._file.fileno(), len(found), found.start)

    def close(self) -> None:
        with self._lock:
            self._cells.clear()
            if self._file is not None:
                self._file.close()


class _RowGroup:
    """The cells of a row group that a unit needs, and the pass that reads them.

    `needed` has the rows of items that are not loaded yet. `finished` means that the file was
    closed to stay within `OPEN_PASSES`, and is not left open again.
    """

    def __init__(
        self,
        name: Group,
        kept: _KeptCells,
        decoding: threading.Semaphore,
        retries: Retries,
    ) -> None:
        self.needed: set[int] = set()
        self.finished = False
        self._name = name
        self._kept = kept
        self._decoding = decoding
        self.retries = retries
        self._lock = threading.Lock()
        self._file = contextlib.ExitStack()
        self._cells: Iterator[tuple[int, Data]] | None = None
        self._next = 0  # number of the row that the pass reads next
        self._rows = 0

    def read(self, row: int) -> bytes:
        cell = (self._name, row)
        with self._lock:
            self.needed.add(row)
            try:
                if cell in self._kept:
                    data = self._kept.pop(cell)
                else:
                    with self._decoding:
                        data = self._advance(row)
            finally:
                if self.finished:
                    self._stop()
            self.needed.discard(row)
        if data is None:
            raise ItemError("the cell contains no audio")
        if isinstance(data, ItemError):
            raise data
        return data

    def release(self, row: int) -> None:
        if row not in self.needed:  # it was read, so do not wait for the lock
            return
        with self._lock:
            self.needed.discard(row)
            if (self._name, row) in self._kept:
                self._kept.pop((self._name, row))

    def finish(self) -> None:
        """Keep the cells that are needed beyond the current one, and close the file."""
        with self._lock, self._decoding:
            self.finished = True
            missing = [row for row in self.needed if (self._name, row) not in self._kept]
            last = max(missing, default=-1)
            # Errors are raised again by the item that needs the cell.
            with contextlib.suppress(ItemError, pa.ArrowException, *storage_errors()):
                if last >= self._next:
                    for number, data in self._pass():
                        if not self._keep(number, data) or number == last:
                            break
            self._stop()

    def close(self) -> None:
        with self._lock:
            self._stop()

    def _advance(self, row: int) -> Data:
        """Read up to a row, and keep the cells of other items on the way."""
        if row < self._next:  # it was read before, and not kept
            self._stop()
        fresh = self._cells is None
        cells = self._pass()
        if row >= self._rows:
            raise ItemError(f"row group {self._name[1]} has {self._rows} rows, but no row {row}")
        for number, data in cells:
            if number == row:
                return data
            self._keep(number, data)
        self._stop()  # the pass stopped at an error
        if fresh:
            raise ItemError(f"row group {self._name[1]} ends before row {row}")
        return self._advance(row)

    def _keep(self, number: int, data: Data) -> bool:
        """Keep a cell if it is needed. False if there is no space for it."""
        cell = (self._name, number)
        return number not in self.needed or cell in self._kept or self._kept.add(cell, data)

    def _pass(self) -> Iterator[tuple[int, Data]]:
        """The pass; a new one if there is none."""
        if self._cells is None:
            self._stop()  # a pass that could not begin may have left its file open
            self._cells = self._begin()
        return self._cells

    def _begin(self) -> Iterator[tuple[int, Data]]:
        uri, row_group, name = self._name
        file = self._file.enter_context(open_table(uri, self.retries.progress))
        if row_group >= file.metadata.num_row_groups:
            raise ItemError(f"the file has no row group {row_group}")
        try:
            column = audio_column(file.schema_arrow, name, "its file")
        except SourceError as error:
            raise ItemError(str(error).rstrip(".")) from error
        self._rows = file.metadata.row_group(row_group).num_rows
        batches = file.iter_batches(
            _ROWS, row_groups=[row_group], columns=column.columns, use_threads=False
        )
        return self._needed_cells(batches, column)

    def _needed_cells(
        self, batches: Iterator[Any], column: AudioColumn
    ) -> Iterator[tuple[int, Data]]:
        """The number of each row and its audio, which is None if no item needs it now."""
        for batch in batches:
            for row in range(len(batch)):
                number = self._next
                data: Data = None
                if number in self.needed and (self._name, number) not in self._kept:
                    try:
                        data = column.read(batch, row)
                    except ItemError as error:  # only this cell is invalid
                        data = error
                self._next += 1
                yield number, data

    def _stop(self) -> None:
        """Close the file. The next pass begins at row 0."""
        self._cells = None
        self._next = 0
        self._file.close()


def _size(data: Data) -> int:
    return len(data) if isinstance(data, bytes) else 0


def _has_space(file: IO[bytes], size: int) -> bool:
    disk = os.fstatvfs(file.fileno())
    reserve = min(DISK_RESERVE, disk.f_blocks * disk.f_frsize // 10)
    return disk.f_bavail * disk.f_frsize - size >= reserve


class _Watched:
    """An open file that calls `on_bytes` after each read."""

    def __init__(self, file: IO[bytes], on_bytes: Callable[[], object]) -> None:
        self._file, self._on_bytes = file, on_bytes

    def read(self, size: int = -1) -> bytes:
        data = self._file.read(size)
        self._on_bytes()
        return data

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


@contextlib.contextmanager
def open_table(uri: str, on_bytes: Callable[[], object] = lambda: None) -> Iterator[Any]:
    """Open a Parquet file that reads its column chunks piece by piece.

    `on_bytes` is called whenever bytes of a remote file have arrived. Raises OSError and other
    errors of pyarrow and the storage.
    """
    with contextlib.ExitStack() as stack:
        if "://" in uri:
            fs, path = open_filesystem(uri)
            source = _Watched(stack.enter_context(fs.open(path, "rb")), on_bytes)
        else:
            source = stack.enter_context(pa.OSFile(uri, "rb"))
        file = pq.ParquetFile(source, buffer_size=_PIECE, pre_buffer=False)
        stack.enter_context(contextlib.closing(file))
        yield file


def _group_of(uri: str, cell: TableCell) -> Group:
    return uri, cell.row_group, cell.column
