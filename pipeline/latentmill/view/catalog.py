"""Search over the records of a store: its metadata file, read row group by row group."""

from __future__ import annotations

import json
import math
import re
import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from latentmill.errors import ConfigError
from latentmill.sources.address import starts_at
from latentmill.store.metadata import PREFIX
from latentmill.store.metadata_file import damaged_metadata, metadata_of
from latentmill.store.schema import json_text
from latentmill.store.store import LatentStore
from latentmill.view.query import FieldCondition, Search

Positions = npt.NDArray[np.int64]
Check = Callable[[], None]  # called between row groups; raises if nobody waits for the result

LISTED = ("key", "duration", "loudness", "silence", "group", "role")
_HIDDEN = ("shape", "metadata")  # a list; the text that the typed columns come from
_CACHED = 8  # searches whose results are kept, for further pages
_MOST_VALUES = 50
EXACT = 2**53 - 1  # the largest whole number that JavaScript has without rounding
_DISTINCT = 5_000  # a field with more values has no list of values


@dataclass(frozen=True)
class SearchField:
    """A field that can be searched.

    Attributes:
        name: Name of the column.
        label: Name for people, without the prefix of the items' own metadata.
        kind: `text`, `number` or `bool`.
        own: Whether it is from the items' own metadata.
    """

    name: str
    label: str
    kind: str
    own: bool


class Catalog:
    """The metadata of all records by position in the index. Methods may be called by any thread."""

    def __init__(self, store: LatentStore) -> None:
        self._lock, self._damaged = threading.Lock(), damaged_metadata(store)
        self._found: OrderedDict[Search, Positions] = OrderedDict()
        self._table = metadata_of(store)
        footer = self._table.metadata
        groups = range(footer.num_row_groups)
        sizes = [footer.row_group(group).num_rows for group in groups]
        self._starts = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])
        self.fields = {
            field.name: field for field in map(_field, self._table.schema_arrow) if field
        }

    def __len__(self) -> int:
        return int(self._starts[-1])

    def search(self, search: Search, check: Check = lambda: None) -> Positions:
        """Positions of the records that match, in the wanted order."""
        self._check_search(search)
        with self._lock:
            if search not in self._found:
                self._found[search] = self._search(search, check)
                while len(self._found) > _CACHED:
                    self._found.popitem(last=False)
            self._found.move_to_end(search)
            return self._found[search]

    def listed(self, positions: Sequence[int]) -> list[dict[str, Any]]:
        """What the page lists of some records.

        `begin` is where a segment begins in its recording, in seconds; 0 for a whole recording.
        """
        rows = self.rows(positions, (*LISTED, "source_uri"))
        begins = starts_at(pa.array([row.pop("source_uri") for row in rows], pa.string()))
        return [{**row, "begin": begin or 0.0} for row, begin in zip(rows, begins, strict=True)]

    def rows(self, positions: Sequence[int], names: Sequence[str] = LISTED) -> list[dict[str, Any]]:
        """The values of some records, as JSON values."""
        found: dict[int, dict[str, Any]] = {}
        groups = np.searchsorted(self._starts, np.asarray(positions, np.int64), side="right") - 1
        with self._lock:
            for group in sorted(set(groups.tolist())):
                here = [p for p, g in zip(positions, groups, strict=True) if g == group]
                table = self._read(group, names)
                places = pa.array([p - int(self._starts[group]) for p in here], pa.int64())
                for position, row in zip(here, table.take(places).to_pylist(), strict=True):
                    found[position] = {name: _plain(value) for name, value in row.items()}
        return [found[position] for position in positions]

    def record(self, position: int) -> dict[str, Any]:
        """All values of one record."""
        names = [f.name for f in self._table.schema_arrow if not f.name.startswith(PREFIX)]
        (row,) = self.rows([position], names)
        if re.search(r"\d{16}", row["metadata"] or ""):
            own = json.loads(row["metadata"], parse_int=lambda text: _plain(int(text)))
            row["metadata"] = json_text(own)
        return row

    def values(self, name: str, check: Check = lambda: None) -> list[tuple[Any, int]]:
        """The most frequent values of a text field, with counts; empty if there are too many."""
        if name not in self.fields or self.fields[name].kind != "text":
            raise ConfigError(f"{name!r} is not a text field: use one of the fields of the store.")
        counts: Counter[Any] = Counter()
        with self._lock:
            for _, table in self._groups([name], check):
                for entry in pc.value_counts(table[name]).to_pylist():
                    if entry["values"] is not None:
                        counts[entry["values"]] += entry["counts"]
                if len(counts) > _DISTINCT:
                    return []
        return sorted(counts.most_common(_MOST_VALUES), key=lambda pair: (-pair[1], pair[0]))

    def _check_search(self, search: Search) -> None:
        for condition in search.where:
            field = self.fields.get(condition.field)
            if field is None:
                raise ConfigError(
                    f"The records have no field {condition.field!r}: use one of the listed fields."
                )
            if condition.op not in _OPERATIONS[field.kind] or not _fits(field, condition.value):
                raise ConfigError(
                    f"The field {field.label!r} cannot be compared by {condition.op!r} with "
                    f"{condition.value!r}: it has values of type {field.kind}."
                )
        sortable = self.fields.get(search.sort)
        if search.sort != "key" and (sortable is None or sortable.kind != "number"):
            raise ConfigError(f"The records cannot be sorted by {search.sort!r}: use a number.")

    def _search(self, search: Search, check: Check) -> Positions:
        names = {condition.field for condition in search.where}
        names |= {"key"} if search.key else set()
        names |= {search.sort} if search.sort != "key" else set()
        if not names:
            every = np.arange(len(self), dtype=np.int64)
            return every[::-1] if search.descending else every
        found, values = [], []
        for start, table in self._groups(sorted(names), check):
            mask = _key_mask(table, search.key)
            for condition in search.where:
                mask &= _mask(table[condition.field], condition)
            here = np.flatnonzero(mask)
            found.append(start + here)
            if search.sort != "key":
                values.append(table[search.sort].take(pa.array(here)))
        positions: Positions = np.concatenate([np.zeros(0, np.int64), *found])
        if search.sort == "key":
            return positions[::-1] if search.descending else positions
        if not values:
            return positions
        column = pa.chunked_array([chunk for one in values for chunk in one.chunks], values[0].type)
        return positions[_order(column, descending=search.descending)]

    def _groups(self, names: Sequence[str], check: Check) -> Iterator[tuple[int, pa.Table]]:
        for group, start in enumerate(self._starts[:-1].tolist()):
            check()
            yield start, self._read(group, names)

    def _read(self, group: int, names: Sequence[str]) -> pa.Table:
        try:
            return self._table.read_row_group(group, columns=list(names), use_threads=False)
        except (pa.ArrowException, OSError, ValueError) as error:
            raise self._damaged from error


_OPERATIONS = {"text": ("is", "contains"), "number": ("is", "min", "max"), "bool": ("is",)}


def _fits(field: SearchField, value: bool | float | str) -> bool:
    if field.kind == "number" and isinstance(value, str):  # as `_plain` sends large numbers
        return re.fullmatch(r"-?[0-9]{16,19}", value) is not None
    kinds = {"text": str, "bool": bool, "number": int | float}
    is_bool = isinstance(value, bool)
    return isinstance(value, kinds[field.kind]) and is_bool == (field.kind == "bool")


def _key_mask(table: pa.Table, text: str) -> npt.NDArray[np.bool_]:
    if not text:
        return np.ones(len(table), bool)
    if set(text) & set("*?"):
        found = pc.match_substring_regex(table["key"], _glob(text), ignore_case=True)
    else:
        found = pc.match_substring(table["key"], text, ignore_case=True)
    return _as_mask(found)


def _glob(text: str) -> str:
    """A regular expression for a whole key: `*` is any text, `?` any character."""
    special = {"*": ".*", "?": "."}
    parts = (special.get(c) or (c if c.isalnum() else f"\\x{{{ord(c):x}}}") for c in text)
    return f"(?s)^(?:{''.join(parts)})$"


def _mask(column: pa.ChunkedArray, condition: FieldCondition) -> npt.NDArray[np.bool_]:
    value = condition.value
    if condition.op == "contains":
        return _as_mask(pc.match_substring(column, str(value), ignore_case=True))
    compare = {"is": pc.equal, "min": pc.greater_equal, "max": pc.less_equal}[condition.op]
    if pa.types.is_integer(column.type):
        bound = _integer(int(value) if isinstance(value, str) else value, condition.op)
        if bound is None:
            return np.zeros(len(column), bool)
        return _as_mask(compare(column, pa.scalar(bound, pa.int64())))
    if pa.types.is_floating(column.type):
        value = float(value)
    return _as_mask(compare(column, pa.scalar(value)))


def _integer(value: float, op: str) -> int | None:
    """The bound for an integer column that means the same as `value`; None if none can meet it."""
    if op == "is" and value != int(value):
        return None
    rounded = math.ceil(value) if op == "min" else math.floor(value)
    impossible = (rounded >= 2**63 and op != "max") or (rounded < -(2**63) and op != "min")
    return None if impossible else max(-(2**63), min(2**63 - 1, rounded))


def _order(column: pa.ChunkedArray, *, descending: bool) -> Positions:
    """The order of a column's values; equal ones stay in order, missing ones are last."""
    if pa.types.is_integer(column.type):
        missing = column.is_null().to_numpy()
        values = pc.fill_null(column, 0).to_numpy()
        keys = np.bitwise_not(values) if descending else values  # reversed without an overflow
        order: Positions = np.lexsort((keys, missing))
        return order
    values = column.cast(pa.float64()).to_numpy()
    # NaN, which stands for a missing value, is sorted to the end.
    return np.argsort(-values if descending else values, kind="stable")


def _as_mask(found: Any) -> npt.NDArray[np.bool_]:
    mask: npt.NDArray[np.bool_] = pc.fill_null(found, False).to_numpy()
    return np.array(mask, bool)


def _field(column: pa.Field) -> SearchField | None:
    own = column.name.startswith(PREFIX)
    if column.name in _HIDDEN:
        return None
    kind = "text"
    if pa.types.is_boolean(column.type):
        kind = "bool"
    elif pa.types.is_integer(column.type) or pa.types.is_floating(column.type):
        kind = "number"
    elif not pa.types.is_string(column.type):
        return None
    return SearchField(
        column.name, column.name.removeprefix(PREFIX) if own else column.name, kind, own
    )


def _plain(value: Any) -> Any:
    """JSON has no NaN and no infinity, and JavaScript rounds larger whole numbers."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return str(value) if isinstance(value, int) and abs(value) > EXACT else value
