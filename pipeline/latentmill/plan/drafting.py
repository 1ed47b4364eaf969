"""A draft: a source's items in the plan's order, split into units, before they are in a store.

The items are sorted by group (or else key) and then by key, so that the plan depends on the content
of the source, not on the order of its listing. They are sorted on the local disk, so that memory
does not grow with their number.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa

from latentmill.errors import SourceError, StorageError
from latentmill.plan.items import DRAFT_SCHEMA, draft_table
from latentmill.plan.sort import Sorter, TableFile, read_tables
from latentmill.sources.base import Item
from latentmill.storage.closeable import Closeable

MAX_UNIT_ITEMS = 10_000
SMALLEST_UNIT_SECONDS = 60.0
LARGEST_UNIT_SECONDS = 4 * 3600.0
TARGET_UNITS = 256
DEFAULT_SHARD_SIZE = 1 << 30

SORT_ITEMS = 1 << 15
SORT_BYTES = 64 << 20  # of metadata, which can be large


@dataclass(frozen=True)
class UnitLimits:
    """Maximum size of a unit.

    Attributes:
        unit_seconds: Seconds of audio. None makes about 256 units of one minute to four hours.
        shard_size: Estimated bytes of latents. None means no limit.
        bytes_per_second: Bytes of latents per second of audio.
    """

    unit_seconds: float | None = None
    shard_size: int | None = None
    bytes_per_second: float = 0.0

    def micros(self, total: int) -> float:
        """The maximum audio of a unit, if the corpus has `total` audio; both in microseconds."""
        if self.unit_seconds is not None:
            limit = self.unit_seconds * 1e6
        else:
            smallest, largest = SMALLEST_UNIT_SECONDS * 1e6, LARGEST_UNIT_SECONDS * 1e6
            limit = min(max(total / TARGET_UNITS, smallest), largest)
        if self.shard_size is not None and self.bytes_per_second:
            limit = min(limit, 1e6 * self.shard_size / self.bytes_per_second)
        return limit


class UnitSize(NamedTuple):  # faster to create than a dataclass
    """Size of a unit or block: its number of items, microseconds of audio and encoded bytes."""

    items: int
    micros: int
    bytes: int


@dataclass
class Totals:
    """Totals over the items of a draft; times in microseconds."""

    items: int = 0
    micros: int = 0
    estimated_micros: int = 0
    estimated_items: int = 0
    bytes: int = 0
    formats: Counter[str] = field(default_factory=Counter)
    grouped: bool = False

    def add(self, table: pa.Table) -> None:
        """Add rows of `DRAFT_SCHEMA`."""
        micros = table["micros"].to_pylist()
        # In Python, because pyarrow.compute is slow to import: every command reads plans.
        lengths = zip(table["seconds"].to_pylist(), table["duration"].to_pylist(), strict=True)
        known = [seconds if seconds is not None else duration for seconds, duration in lengths]
        guessed = [guess for guess, one in zip(micros, known, strict=True) if one is None]
        self.items += len(table)
        self.micros += sum(micros)
        self.bytes += sum(table["size"].to_pylist())
        self.estimated_items += len(guessed)
        self.estimated_micros += sum(guessed)
        self.formats.update(table["extension"].to_pylist())
        self.grouped = self.grouped or table["group"].null_count < len(table)


class Draft(Closeable):
    """Items in order, split into units. A context manager, which deletes its files at the end."""

    def __init__(self) -> None:
        try:
            self._folder = tempfile.TemporaryDirectory(prefix="latentmill-plan-")
        except OSError as error:
            raise StorageError(
                f"The plan cannot be sorted, because no temporary folder can be created ({error}): "
                "set TMPDIR to a writable folder."
            ) from error
        self.sizes: tuple[UnitSize, ...] = ()
        self.totals = Totals()

    @property
    def folder(self) -> Path:
        return Path(self._folder.name)

    def tables(self) -> Iterator[pa.Table]:
        """All items in the plan's order, as rows of `DRAFT_SCHEMA`."""
        return read_tables(self._sorted)

    @property
    def _sorted(self) -> Path:
        return self.folder / "sorted.arrow"

    def fill(self, tables: Iterable[pa.Table], limits: UnitLimits) -> None:
        """Store the sorted rows and split them into units. `totals` must be complete."""
        with TableFile(self._sorted, DRAFT_SCHEMA) as file:
            blocks = _blocks(_written(tables, file))
            self.sizes = tuple(split(blocks, limits.micros(self.totals.micros)))

    def close(self) -> None:
        self._folder.cleanup()


def draft(items: Iterable[Item], limits: UnitLimits) -> Draft:
    """Sort the items of a source and split them into units.

    Raises SourceError if two items have the same key.
    """
    with contextlib.ExitStack() as undo:
        made = undo.enter_context(Draft())
        sorter = Sorter(made.folder / "sorting", ("block", "key"))
        for some in _batches(items):
            table = draft_table(some)
            made.totals.add(table)
            sorter.push(table)
        if made.totals.grouped:
            _refuse_duplicate_keys(sorter, made.folder / "keys")
        made.fill(sorter.tables(), limits)
        undo.pop_all()
    return made


def split(blocks: Iterable[UnitSize], limit: float) -> Iterator[UnitSize]:
    """Combine blocks, in order, into units of at most `limit` microseconds.

    A block is an item, or all items of one group. Blocks are never split, so a unit of one block
    may be longer. The result depends on the blocks alone.
    """
    items, micros, size = 0, 0, 0
    for block in blocks:
        full = micros > 0 and micros + block.micros > limit
        if items and (full or items + block.items > MAX_UNIT_ITEMS):
            yield UnitSize(items, micros, size)
            items, micros, size = 0, 0, 0
        items, micros, size = items + block.items, micros + block.micros, size + block.bytes
    if items:
        yield UnitSize(items, micros, size)


def _batches(items: Iterable[Item]) -> Iterator[list[Item]]:
    some: list[Item] = []
    size = 0
    for item in items:
        some.append(item)
        size += len(item.metadata)
        if len(some) >= SORT_ITEMS or size >= SORT_BYTES:
            yield some
            some, size = [], 0
    if some:
        yield some


def _written(tables: Iterable[pa.Table], file: TableFile) -> Iterator[pa.Table]:
    for table in tables:
        file.write(table)
        yield table


def _blocks(tables: Iterable[pa.Table]) -> Iterator[UnitSize]:
    """Sizes of the blocks: items of one group, or a single item. Refuses equal keys."""
    block: str | None = None
    key = uri = ""
    items, micros, size = 0, 0, 0
    for table in tables:
        names = ("block", "key", "uri", "micros", "size")
        columns = [table[name].to_pylist() for name in names]
        for row_block, row_key, row_uri, row_micros, row_size in zip(*columns, strict=True):
            if row_block != block:
                if items:
                    yield UnitSize(items, micros, size)
                block, items, micros, size = row_block, 0, 0, 0
            elif row_key == key:
                raise _duplicate_key(row_key, uri, row_uri)
            key, uri = row_key, row_uri
            items, micros, size = items + 1, micros + row_micros, size + row_size
    if items:
        yield UnitSize(items, micros, size)


def _refuse_duplicate_keys(sorter: Sorter, folder: Path) -> None:
    """Refuse equal keys in different groups, which are not adjacent in the plan's order."""
    by_key = Sorter(folder, ("key", "uri"))
    for run in sorter.files:
        by_key.push(pa.concat_tables(t.select(["key", "uri"]) for t in read_tables(run)))
    before = None
    for table in by_key.tables():
        for key, uri in zip(table["key"].to_pylist(), table["uri"].to_pylist(), strict=True):
            if before is not None and before[0] == key:
                raise _duplicate_key(key, before[1], uri)
            before = (key, uri)


def _duplicate_key(key: str, one: str, other: str) -> SourceError:
    first, second = sorted((one, other))
    where = f"in {first}" if first == second else f"{first} and {second}"
    return SourceError(
        f"Two items have the key {key!r} ({where}): rename one of them, or use a column with "
        "unique values for the keys."
    )
