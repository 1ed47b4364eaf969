"""A draft: a source's items in the plan's order and cut into units, not in a store yet.

The items are sorted by group (or else key) and key, on this machine's disk, so that their number
needs no memory: the plan depends on what the source holds, not on the order of its listing.
"""

from __future__ import annotations

import contextlib
import itertools
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from operator import itemgetter
from pathlib import Path

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

RUN_ITEMS = 1 << 15
RUN_BYTES = 64 << 20  # of metadata: some tell a lot


@dataclass(frozen=True)
class Cutting:
    """How large a unit may become.

    Attributes:
        unit_seconds: Seconds of audio; None: about 256 units, of one minute to four hours each.
        shard_size: Estimated bytes of latents; None: any number.
        bytes_per_second: What a second of audio becomes, in bytes of latents.
    """

    unit_seconds: float | None = None
    shard_size: int | None = None
    bytes_per_second: float = 0.0

    def micros(self, total: int) -> float:
        """The most audio of a unit in a corpus of `total`, both in microseconds."""
        if self.unit_seconds is not None:
            limit = self.unit_seconds * 1e6
        else:
            smallest, largest = SMALLEST_UNIT_SECONDS * 1e6, LARGEST_UNIT_SECONDS * 1e6
            limit = min(max(total / TARGET_UNITS, smallest), largest)
        if self.shard_size is not None and self.bytes_per_second:
            limit = min(limit, 1e6 * self.shard_size / self.bytes_per_second)
        return limit


@dataclass(frozen=True)
class UnitSize:
    """A unit of a draft: the next `items` items."""

    items: int
    micros: int
    bytes: int


@dataclass
class Totals:
    """What the items of a draft are together; times in microseconds."""

    items: int = 0
    micros: int = 0
    estimated_micros: int = 0
    estimated_items: int = 0
    bytes: int = 0
    formats: Counter[str] = field(default_factory=Counter)
    grouped: bool = False

    def add(self, table: pa.Table) -> None:
        """Count the items of some rows of `DRAFT_SCHEMA`."""
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
    """Items in order, cut into units. A context manager: its files vanish at the end."""

    def __init__(self) -> None:
        try:
            self._folder = tempfile.TemporaryDirectory(prefix="latentmill-plan-")
        except OSError as error:
            raise StorageError(
                f"The plan cannot be sorted, as there is no place for temporary files: {error}."
            ) from error
        self.cuts: tuple[UnitSize, ...] = ()
        self.totals = Totals()

    @property
    def folder(self) -> Path:
        """Where its files are."""
        return Path(self._folder.name)

    def tables(self) -> Iterator[pa.Table]:
        """All items in order, as rows of `DRAFT_SCHEMA`."""
        return read_tables(self._sorted)

    @property
    def _sorted(self) -> Path:
        return self.folder / "sorted.arrow"

    def fill(self, tables: Iterable[pa.Table], cutting: Cutting) -> None:
        """Take the sorted rows, and cut them; the totals are known already."""
        with TableFile(self._sorted, DRAFT_SCHEMA) as file:
            blocks = _blocks(_written(tables, file))
            self.cuts = tuple(cut(blocks, cutting.micros(self.totals.micros)))

    def close(self) -> None:
        """Remove the files."""
        self._folder.cleanup()


def draft(items: Iterable[Item], cutting: Cutting) -> Draft:
    """Sort the items of a source and cut them into units.

    Raises:
        SourceError: Two items have the same key.
        StorageError: This machine has no room for temporary files.
    """
    with contextlib.ExitStack() as undo:
        made = undo.enter_context(Draft())
        sorter = Sorter(made.folder / "runs", ("block", "key"))
        for some in _runs(items):
            table = draft_table(some)
            made.totals.add(table)
            sorter.push(table)
        if made.totals.grouped:
            _refuse_twins(sorter, made.folder / "keys")
        made.fill(sorter.tables(), cutting)
        undo.pop_all()
    return made


def cut(blocks: Iterable[UnitSize], limit: float) -> Iterator[UnitSize]:
    """Cut blocks, in order, into units of at most `limit` microseconds, but whole blocks each.

    A block is an item, or the items of one group. Depends on the blocks alone.
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


def _runs(items: Iterable[Item]) -> Iterator[list[Item]]:
    some: list[Item] = []
    size = 0
    for item in items:
        some.append(item)
        size += len(item.metadata)
        if len(some) >= RUN_ITEMS or size >= RUN_BYTES:
            yield some
            some, size = [], 0
    if some:
        yield some


def _written(tables: Iterable[pa.Table], file: TableFile) -> Iterator[pa.Table]:
    for table in tables:
        file.write(table)
        yield table


def _blocks(tables: Iterable[pa.Table]) -> Iterator[UnitSize]:
    """What is never parted: items with the same group, or one without; refuses equal keys."""
    for _, rows in itertools.groupby(_rows(tables), key=itemgetter(0)):
        items, micros, size, before = 0, 0, 0, None
        for _, key, uri, row_micros, row_size in rows:
            if before is not None and before[0] == key:
                raise _twins(key, before[1], uri)
            before = (key, uri)
            items, micros, size = items + 1, micros + row_micros, size + row_size
        yield UnitSize(items, micros, size)


def _rows(tables: Iterable[pa.Table]) -> Iterator[tuple[str, str, str, int, int]]:
    for table in tables:
        names = ("block", "key", "uri", "micros", "size")
        yield from zip(*(table[name].to_pylist() for name in names), strict=True)


def _refuse_twins(sorter: Sorter, folder: Path) -> None:
    """Equal keys in different groups are no neighbours in the plan's order: look by key."""
    by_key = Sorter(folder, ("key", "uri"))
    for run in sorter.runs:
        by_key.push(pa.concat_tables(t.select(["key", "uri"]) for t in read_tables(run)))
    before = None
    for table in by_key.tables():
        for key, uri in zip(table["key"].to_pylist(), table["uri"].to_pylist(), strict=True):
            if before is not None and before[0] == key:
                raise _twins(key, before[1], uri)
            before = (key, uri)


def _twins(key: str, one: str, other: str) -> SourceError:
    first, second = sorted((one, other))
    where = f"in {first}" if first == second else f"{first} and {second}"
    return SourceError(
        f"Two items have the key {key!r} ({where}): a key names one item; rename one, or take "
        "keys from a column that is unique."
    )
