"""External sorting, for more rows than fit in memory: sorted files on the local disk are merged."""

from __future__ import annotations

import bisect
import contextlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from latentmill.storage.closeable import Closeable
from latentmill.storage.storage import writing

# While files are merged, this much of each is in memory.
BATCH_BYTES = 1 << 20
SMALLEST_BATCH, LARGEST_BATCH = 64, 4096

FAN_IN = 128
"""Number of files that are merged at once. Each needs an open file and a batch in memory."""

# Without threads: Arrow's threads may abort the process if they start shortly before its end.
_WRITE = pa.ipc.IpcWriteOptions(compression="lz4", use_threads=False)
_READ = pa.ipc.IpcReadOptions(use_threads=False)


class Sorter:
    """Sorts any number of rows by columns without nulls, in bounded memory."""

    def __init__(self, folder: Path, by: Sequence[str]) -> None:
        """`folder` must be empty or missing; the sorted files are written to it."""
        self._folder = folder
        self._by = list(by)
        self._files: list[Path] = []
        self._written = 0
        with _writing(folder):
            folder.mkdir(parents=True, exist_ok=True)

    @property
    def files(self) -> list[Path]:
        """The sorted Arrow IPC files so far."""
        return self._files

    def push(self, table: pa.Table) -> None:
        """Sort a table and write it to a file."""
        self._files.append(self._write([sort(table, self._by)], table.schema))

    def tables(self) -> Iterator[pa.Table]:
        """All rows in order, several thousand at a time."""
        while len(self._files) > FAN_IN:
            some, rest = self._files[:FAN_IN], self._files[FAN_IN:]
            with pa.OSFile(str(some[0])) as file:
                schema = pa.ipc.open_file(file, options=_READ).schema
            self._files = [*rest, self._write(self._merged(some), schema)]
            for path in some:
                path.unlink()
        return self._merged(self._files)

    def _write(self, tables: Iterable[pa.Table], schema: pa.Schema) -> Path:
        path = self._folder / f"{self._written:06d}.arrow"
        self._written += 1
        with TableFile(path, schema) as file:
            for table in tables:
                file.write(table)
        return path

    def _merged(self, paths: Sequence[Path]) -> Iterator[pa.Table]:
        with contextlib.ExitStack() as stack:
            files = [stack.enter_context(pa.OSFile(str(path))) for path in paths]
            readers = [_FileReader(file, self._by) for file in files]
            while readers := [reader for reader in readers if reader.fill()]:
                # All rows up to the horizon are in memory: later batches have larger rows.
                horizon = min(reader.last for reader in readers)
                parts = [reader.take(horizon) for reader in readers]
                yield sort(pa.concat_tables(part for part in parts if len(part)), self._by)


class _FileReader:
    """Reads a sorted file for merging, one batch at a time."""

    def __init__(self, file: pa.NativeFile, by: Sequence[str]) -> None:
        self._reader = pa.ipc.open_file(file, options=_READ)
        self._by = by
        self._next = 0
        self._table: pa.Table | None = None

    def fill(self) -> bool:
        """Load the next batch if the current one is used up. False at the end of the file."""
        while self._table is None or not len(self._table):
            if self._next == self._reader.num_record_batches:
                return False
            self._table = pa.Table.from_batches([self._reader.get_batch(self._next)])
            self._next += 1
            self._columns = [self._table[name].chunk(0) for name in self._by]
            self._first, self._size = 0, len(self._table)
            self.last = self._row(self._size - 1)
        return True

    def take(self, horizon: tuple[Any, ...]) -> pa.Table:
        """Remove the rows up to the horizon from the batch, and return them."""
        assert self._table is not None
        rows = range(self._first, self._size)
        count = bisect.bisect_right(rows, horizon, key=self._row)
        taken = self._table.slice(0, count)
        self._table = self._table.slice(count)
        self._first += count
        return taken

    def _row(self, row: int) -> tuple[Any, ...]:
        return tuple(column[row].as_py() for column in self._columns)


def sort(table: pa.Table, by: Sequence[str]) -> pa.Table:
    """Sort rows. Strings are ordered by their UTF-8 bytes, which is Python's order of strings."""
    return table.combine_chunks().sort_by([(name, "ascending") for name in by]).combine_chunks()


class TableFile(Closeable):
    """Writes a local Arrow IPC file, in batches of `BATCH_BYTES`."""

    def __init__(self, path: Path, schema: pa.Schema) -> None:
        self._path = path
        with _writing(path):
            self._sink = pa.OSFile(str(path), "wb")
            self._writer = pa.ipc.new_file(self._sink, schema, options=_WRITE)

    def write(self, table: pa.Table) -> None:
        rows = BATCH_BYTES * max(1, len(table)) // max(1, table.nbytes)
        with _writing(self._path):
            self._writer.write_table(table, max(SMALLEST_BATCH, min(rows, LARGEST_BATCH)))

    def close(self) -> None:
        with _writing(self._path):
            self._writer.close()
            self._sink.close()


def read_tables(path: Path) -> Iterator[pa.Table]:
    """Read an Arrow IPC file, batch by batch."""
    with pa.OSFile(str(path)) as file:
        reader = pa.ipc.open_file(file, options=_READ)
        for number in range(reader.num_record_batches):
            yield pa.Table.from_batches([reader.get_batch(number)])


def _writing(path: Path) -> contextlib.AbstractContextManager[None]:
    return writing(
        f"temporary files for the plan to {path}", "; set TMPDIR to a folder with more space"
    )
