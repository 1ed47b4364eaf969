"""A draft: a source's items in the plan's order, split into units, before they are in a store.

The items are sorted by group (or else key) and then by key, so that the plan depends on the content
of the source, not on the order of its listing. Cells of a table and segments of remote recordings
that have no group are sorted by their position in it instead, so that it is read once. All are
sorted on the local disk, so that memory does not grow with their number.

Short items fill batches only with others of their length, and a unit has too few of those. So in a
corpus with much audio in short items, neighbours in this order with `SPAN_SECONDS` of audio are
sorted by length before they are split into units.
"""

from __future__ import annotations

import contextlib
import itertools
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
MAX_KEY_BYTES = 2**31 - 1  # an index has 32-bit offsets into the text of its keys

SPAN_SECONDS = 36 * 3600
MIN_SHORT_SECONDS = 3600.0  # with less audio in short items, their order does not matter

SORT_ITEMS = 1 << 15
SORT_BYTES = 64 << 20  # of metadata, which can be large


@dataclass(frozen=True)
class UnitLimits:
    """Maximum size of a unit.

    Attributes:
        unit_seconds: Seconds of audio. None makes about 256 units of one minute to four hours.
        shard_size: Estimated bytes of latents. None means no limit.
        bytes_per_second: Bytes of latents per second of audio.
        chunk_seconds: Length of a chunk. Shorter items are encoded with others of their length.
    """

    unit_seconds: float | None = None
    shard_size: int | None = None
    bytes_per_second: float = 0.0
    chunk_seconds: float = 0.0

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


def key_bytes(table: pa.Table) -> int:
    """The size of the text of the keys in a table."""
    return int(table["key"].nbytes) - 4 * len(table)  # without the offsets


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
    key_bytes: int = 0
    formats: Counter[str] = field(default_factory=Counter)
    grouped: bool = False
    by_key: bool = True  # the order is that of the keys
    shared: bool = False  # items are segments or cells, which share what is read
    chunk_micros: float = 0.0
    short_micros: int = 0  # of items that are shorter than a chunk

    def add(self, table: pa.Table) -> None:
        """Add rows of `DRAFT_SCHEMA`. Raises SourceError if their keys do not fit into an index."""
        self.key_bytes += key_bytes(table)
        if self.key_bytes > MAX_KEY_BYTES:
            raise SourceError(
                f"The keys of the first {self.items + len(table)} items have more than 2 GiB of "
                "text, which does not fit into the index of a store: encode the corpus into "
                "several stores, for example by folder; readers accept a list of stores."
            )
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
        self.short_micros += sum(one for one in micros if one < self.chunk_micros)
        self.grouped = self.grouped or table["group"].null_count < len(table)
        self.by_key = self.by_key and table["block"].equals(table["key"])
        for name in ("start", "row_group"):
            self.shared = self.shared or table[name].null_count < len(table)

    @property
    def by_length(self) -> bool:
        """Whether neighbours are sorted by length before they are split into units."""
        enough = self.short_micros >= MIN_SHORT_SECONDS * 1e6
        return enough and not self.grouped and not self.shared


class Draft(Closeable):
    """Items in order, split into units. A context manager, which deletes its files at the end."""

    def __init__(self, limits: UnitLimits) -> None:
        try:
            self._folder = tempfile.TemporaryDirectory(prefix="latentmill-plan-")
        except OSError as error:
            raise StorageError(
                f"The plan cannot be sorted, because no temporary folder can be created ({error}): "
                "set TMPDIR to a writable folder."
            ) from error
        self.sizes: tuple[UnitSize, ...] = ()
        self.totals = Totals(chunk_micros=1e6 * limits.chunk_seconds)
        self._limits = limits

    @property
    def folder(self) -> Path:
        return Path(self._folder.name)

    def tables(self) -> Iterator[pa.Table]:
        """All items in the plan's order, as rows of `DRAFT_SCHEMA`."""
        return read_tables(self._sorted)

    @property
    def _sorted(self) -> Path:
        return self.folder / "sorted.arrow"

    def fill(self, tables: Iterable[pa.Table]) -> None:
        """Store the sorted rows and split them into units. `totals` must be complete."""
        if self.totals.by_length:
            tables = self._by_length(tables)
        with TableFile(self._sorted, DRAFT_SCHEMA) as file:
            blocks = _blocks(_written(tables, file))
            self.sizes = tuple(split(blocks, self._limits.micros(self.totals.micros)))

    def _by_length(self, tables: Iterable[pa.Table]) -> Iterator[pa.Table]:
        """Sort the items of each span by length; those of a chunk or more stay in order."""
        sorter = Sorter(self.folder / "lengths", ("span", "rank", "key"))
        chunk, seen = round(self.totals.chunk_micros), 0
        for some in _together(_without_duplicates(tables)):
            micros = some["micros"].to_pylist()
            ends = list(itertools.accumulate(micros, initial=seen))
            seen = ends.pop()
            spans = [end // (SPAN_SECONDS * 10**6) for end in ends]
            ranks = [min(one, chunk) for one in micros]
            sorter.push(
                some.append_column("span", pa.array(spans, pa.int64())).append_column(
                    "rank", pa.array(ranks, pa.int64())
                )
            )
        for some in sorter.tables():
            yield some.select(DRAFT_SCHEMA.names)

    def close(self) -> None:
        self._folder.cleanup()


def draft(items: Iterable[Item], limits: UnitLimits) -> Draft:
    """Sort the items of a source and split them into units.

    Raises SourceError if two items have the same key.
    """
    with contextlib.ExitStack() as undo:
        made = undo.enter_context(Draft(limits))
        sorter = Sorter(made.folder / "sorting", ("block", "key"))
        for some in _batches(items):
            table = draft_table(some)
            made.totals.add(table)
            sorter.push(table)
        if not made.totals.by_key:  # equal keys may be in different blocks: sort by key as well
            by_key = Sorter(made.folder / "keys", ("key", "uri"))
            for file in sorter.files:
                by_key.push(pa.concat_tables(t.select(["key", "uri"]) for t in read_tables(file)))
            for _ in _without_duplicates(by_key.tables()):
                pass
        made.fill(sorter.tables())
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


def _together(tables: Iterable[pa.Table]) -> Iterator[pa.Table]:
    """The same rows in fewer, larger tables, so that fewer files are merged."""
    some: list[pa.Table] = []
    for table in tables:
        some.append(table)
        if sum(map(len, some)) >= SORT_ITEMS or sum(one.nbytes for one in some) >= SORT_BYTES:
            yield pa.concat_tables(some)
            some = []
    if some:
        yield pa.concat_tables(some)


def _without_duplicates(tables: Iterable[pa.Table]) -> Iterator[pa.Table]:
    """The tables, which are sorted by key. Refuses equal keys."""
    before: tuple[str, str] | None = None
    for table in tables:
        for key, uri in zip(table["key"].to_pylist(), table["uri"].to_pylist(), strict=True):
            if before is not None and before[0] == key:
                raise _duplicate_key(key, before[1], uri)
            before = (key, uri)
        yield table


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


def _duplicate_key(key: str, one: str, other: str) -> SourceError:
    first, second = sorted((one, other))
    where = f"in {first}" if first == second else f"{first} and {second}"
    return SourceError(
        f"Two items have the key {key!r} ({where}): rename one of them, or use a column with "
        "unique values for the keys."
    )
