"""Reading the stored fields of records without their latents, for metadata and filters."""

from __future__ import annotations

import difflib
import itertools
import json
import re
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from latentmill.encoding.stored import parse_json
from latentmill.errors import ConfigError, StorageError
from latentmill.reader.column_conditions import rows_where
from latentmill.reader.order import Ints
from latentmill.reader.rows import RowReader, with_current_rows
from latentmill.sources.where import Condition
from latentmill.store.annotations import JSON
from latentmill.store.fields import parse_member, read_columns
from latentmill.store.index import Index
from latentmill.store.metadata import METADATA_SCHEMA, PREFIX
from latentmill.store.metadata_file import damaged_metadata, open_metadata
from latentmill.store.schema import FIELD_NAMES, RECORD_SCHEMA
from latentmill.store.store import LatentStore

if TYPE_CHECKING:
    import pyarrow.parquet as pq

# pyarrow has no type hints, so a pyarrow Expression is Any here.
Where: TypeAlias = str | Callable[[Mapping[str, Any]], bool] | Any

FIELDS = tuple(name for name in FIELD_NAMES if name != "levels")
KEPT_BYTES = 256 << 20  # fields kept in memory per process and store
THREADS = 8  # parallel reads of a remote store
_BATCH = 1024  # JSON members of a tar per read


class FieldReader(RowReader):
    """Reads the stored fields of records by row (position in the sorted keys).

    Caches the columns of the shards used last. Small when pickled; not thread-safe.
    """

    def __init__(self, store: LatentStore, columns: Sequence[str] = FIELDS) -> None:
        self.columns = tuple(columns)
        super().__init__(store, self.columns)

    def _use_index(self, index: Index) -> None:
        super()._use_index(index)
        self._shard_of = index.column("shard")
        self._row_in_shard = index.column("row")
        # In a tar the fields of each record are a range of bytes, in Parquet they are columns.
        self._ranges = len(index) > 0 and int(index.column("fields_offset")[0]) >= 0
        self._paths = index.shards

    def _reset(self) -> None:
        self._kept: OrderedDict[int, pa.Table] = OrderedDict()
        self._bytes = 0

    def read(self, rows: Ints) -> list[dict[str, Any]]:
        """Return the fields of some rows, in the order of `rows`."""
        found = self._with_current_index(lambda: self._read(rows))
        if "metadata" not in self.columns or (annotations := self.store.annotations) is None:
            return found
        try:
            pairs = zip(self.keys(rows), found, strict=True)
            merged = [annotations.merged(key, fields["metadata"]) for key, fields in pairs]
        except (ValueError, TypeError) as error:
            raise self._damaged(error) from error
        pairs = zip(merged, found, strict=True)
        return [{**fields, "metadata": metadata} for metadata, fields in pairs]

    def _read(self, rows: Ints) -> list[dict[str, Any]]:
        if self._ranges:
            return self._members(rows)
        shards = self._shard_of[rows].tolist()
        tables = self._tables(set(shards))
        places = self._row_in_shard[rows].tolist()
        columns = {  # looked up once, which takes longer than getting a value
            shard: [(name, table[name]) for name in self.columns] for shard, table in tables.items()
        }
        return [
            {name: column[place].as_py() for name, column in columns[shard]}
            for shard, place in zip(shards, places, strict=True)
        ]

    def gather(self) -> pa.Table:
        """Return the fields of all records, in the order of the keys."""
        return self._with_current_index(self._gather)

    def _gather(self) -> pa.Table:
        if (stored := self._stored()) is not None:
            return stored
        table, annotations = self._of_shards(), self.store.annotations
        if annotations is None or "metadata" not in self.columns:
            return table
        try:
            keys = self.keys(np.arange(len(table)))
            merged = annotations.column(keys, table["metadata"])
        except (ValueError, TypeError) as error:
            raise self._damaged(error) from error
        return table.set_column(self.columns.index("metadata"), "metadata", merged)

    def _of_shards(self) -> pa.Table:
        """The fields of all records as they are stored in the shards."""
        if self._ranges:
            every = np.arange(len(self._index))
            batches = (every[at : at + _BATCH] for at in range(0, len(every), _BATCH))
            members = [member for batch in batches for member in self._members(batch)]
            fields = [RECORD_SCHEMA.field(name).with_nullable(True) for name in self.columns]
            return pa.Table.from_pylist(members, pa.schema(fields))
        tables, found = [], []
        for shard in range(len(self._paths)):
            rows = np.flatnonzero(self._shard_of == shard)
            table = self._table(shard)
            tables.append(table.take(pa.array(self._row_in_shard[rows])))
            found.append(rows)
        order = np.argsort(np.concatenate(found)) if found else np.zeros(0, np.int64)
        if not tables:
            return pa.schema([RECORD_SCHEMA.field(name) for name in self.columns]).empty_table()
        return pa.concat_tables(tables).take(pa.array(order))

    def _stored(self) -> pa.Table | None:
        """The columns in the store's metadata file, if its rows are those of the index."""
        if not set(self.columns) <= set(METADATA_SCHEMA.names):
            return None
        file = open_metadata(self.store)
        if file is None:
            return None
        if self.store.index is not self._index:  # sealed again meanwhile
            self.renew()
        try:
            table = file.read(columns=[*{"key", *self.columns}], use_threads=False)
            if not self._index.has_keys(table["key"]):  # of another seal
                return None
            fields = [METADATA_SCHEMA.field(name) for name in self.columns]
            return table.select(self.columns).cast(pa.schema(fields)).combine_chunks()
        except (pa.ArrowException, OSError, ValueError, LookupError) as error:
            raise damaged_metadata(self.store) from error

    def _members(self, rows: Ints) -> list[dict[str, Any]]:
        offsets = self._index.column("fields_offset")[rows].tolist()
        lengths = self._index.column("fields_length")[rows].tolist()
        paths = [self._paths[shard] for shard in self._shard_of[rows].tolist()]
        found = self.store.storage.read_ranges(list(zip(paths, offsets, lengths, strict=True)))
        try:
            storage = self.store.storage
            members = [
                parse_member(storage, path, data) for path, data in zip(paths, found, strict=True)
            ]
            return [{name: member.get(name) for name in self.columns} for member in members]
        except (ValueError, AttributeError) as error:
            raise self._damaged(error) from error

    def _tables(self, shards: Iterable[int]) -> dict[int, pa.Table]:
        """The tables of some shards, from the cache or from the storage."""
        missing = [shard for shard in shards if shard not in self._kept]
        if self.store.storage.local or len(missing) < 2:
            read = [self._table(shard) for shard in missing]
        else:
            with ThreadPoolExecutor(THREADS) as pool:
                read = list(pool.map(self._table, missing))
        for shard, table in zip(missing, read, strict=True):
            self._kept[shard] = table
            self._bytes += table.nbytes
        tables = {shard: self._kept[shard] for shard in shards}
        for shard in shards:
            self._kept.move_to_end(shard)
        while self._bytes > KEPT_BYTES and len(self._kept) > len(tables):
            self._bytes -= self._kept.popitem(last=False)[1].nbytes
        return tables

    def _table(self, shard: int) -> pa.Table:
        try:
            return read_columns(self.store.storage, self._paths[shard], self.columns)
        except (pa.ArrowException, ValueError) as error:
            raise self._damaged(error) from error

    def _damaged(self, error: Exception) -> StorageError:
        return StorageError(
            f"a shard of {self.store.url} is damaged ({error}): run `latentmill verify "
            f"{self.store.url}` to find it."
        )


def gather(store: LatentStore, columns: Sequence[str]) -> pa.Table:
    """The fields of all records, in the order of the store's index, also after a new seal."""
    return with_current_rows([store], lambda: FieldReader(store, columns).gather())


def select(stores: Sequence[LatentStore], where: Where) -> list[Ints]:
    """The rows of each store's index that match a condition; reads no latents.

    Args:
        stores: One store or several; some of them may have no match.
        where: A condition such as `role == 'drums' and bpm > 100` on stored fields and the items'
            own metadata; a function of a record's fields, in which `metadata` is the item's own
            metadata as a dict; or a pyarrow expression over the stored columns, which is faster.

    Raises:
        ConfigError: The condition cannot be evaluated, uses a field that no record has, or matches
            no record.
    """

    def choose() -> tuple[Any, list[Ints]]:
        holds = _TextCondition(where) if isinstance(where, str) else where
        return holds, [_rows(store, holds) for store in stores]

    holds, chosen = with_current_rows(stores, choose)
    if isinstance(holds, _TextCondition) and holds.missing:
        raise _no_field(min(holds.missing), holds.known)
    if not any(map(len, chosen)):
        raise ConfigError(
            f"No record of {' or '.join(store.url for store in stores)} matches `where`: check its "
            "values, or remove `where`."
        )
    return chosen


class _TextCondition:
    """A condition, its fields that no record had so far, and all fields that occurred."""

    def __init__(self, text: str) -> None:
        self._condition = Condition(text)
        self._fields = self._condition.fields
        self.missing, self.known = set(self._fields), set(FIELDS)

    def __call__(self, fields: Mapping[str, Any]) -> bool:
        every = {**fields["metadata"], **fields}
        if self.missing:  # not needed once every field was found
            self.known.update(every)
            self.missing = {name for name in self.missing if not _has(every, name.split("."))}
        return self._condition.holds(every)

    def rows(self, store: LatentStore) -> Ints | None:
        """The rows of a store for which it holds, from the columns that it uses alone.

        None if the store's metadata file does not have all of them with their values' own types.
        """
        columns = {name: name if name in FIELDS else PREFIX + name for name in self._fields}
        kinds = {} if store.annotations is None else store.annotations.kinds
        plain = not any(
            "." in name or name == "metadata" or kinds.get(name) == JSON for name in columns
        )
        file = open_metadata(store) if plain else None
        if file is None or not set(columns.values()) <= set(file.schema_arrow.names):
            return None
        # The column of a name with values of several types, in the base of a view too, is text.
        texts = [
            name
            for name, column in columns.items()
            if column != name and file.schema_arrow.field(column).type == pa.string()
        ]
        annotated = store.bases is not None or kinds
        if annotated and _have_other_types(file, texts):
            return None
        try:
            table = file.read(columns=["key", *columns.values()], use_threads=False)
            if not store.index.has_keys(table["key"]):  # of another seal
                return None
            typed = {name: table[column] for name, column in columns.items()}
            found = rows_where(self._condition.tree, typed)
            values = [] if found is not None else [one.to_pylist() for one in typed.values()]
        except (pa.ArrowException, OSError, ValueError, LookupError) as error:
            raise damaged_metadata(store) from error
        self.missing -= columns.keys()
        if found is not None:
            return np.flatnonzero(found)
        holds, names = self._condition.holds, list(columns)
        each = zip(*values, strict=True) if values else itertools.repeat((), len(table))
        return np.array(
            [row for row, one in enumerate(each) if holds(dict(zip(names, one, strict=True)))],
            np.int64,
        )


def _have_other_types(file: pq.ParquetFile, names: Sequence[str]) -> bool:
    """Whether a record's metadata may have a value that is not text for any of some names."""
    quoted = [json.dumps(name, ensure_ascii=False) for name in names]
    if any("\\" in one for one in quoted):  # it could end the literal part of the pattern
        return True
    pattern = "(" + "|".join(rf"\Q{one}\E" for one in quoted) + r'):\s*[^"\sn]'  # of RE2
    for group in range(file.num_row_groups if names else 0):
        column = file.read_row_group(group, columns=["metadata"], use_threads=False)["metadata"]
        if pc.any(pc.match_substring_regex(column, pattern)).as_py():
            return True
    return False


def _has(fields: Any, path: Sequence[str]) -> bool:
    for name in path:
        if not isinstance(fields, Mapping) or name not in fields:
            return False
        fields = fields[name]
    return True


def _rows(store: LatentStore, where: Any) -> Ints:
    """The rows for which a function of the fields, or a pyarrow expression, holds."""
    if isinstance(where, _TextCondition):
        found = where.rows(store)
        if found is not None:
            return found
    table = FieldReader(store, FIELDS).gather()
    try:
        if isinstance(where, pc.Expression):
            with_row = table.append_column("__row", pa.array(np.arange(len(table))))
            return np.asarray(with_row.filter(where)["__row"].to_numpy(), np.int64)
        rows = [row for row, fields in enumerate(_parsed(table)) if where(fields)]
        return np.array(rows, np.int64)
    except (pa.ArrowException, LookupError, TypeError, ValueError, AttributeError) as error:
        name = _missing_field(error)
        if name is not None:
            own = (field for fields in _parsed(table) for field in fields["metadata"])
            raise _no_field(name, {*FIELDS, *own}) from error
        raise ConfigError(
            f"cannot evaluate `where` on {store.url} ({type(error).__name__}: {error}): use the "
            f"fields {', '.join(FIELDS)}."
        ) from error


def _missing_field(error: Exception) -> str | None:
    """The field that a function or an expression did not find."""
    if isinstance(error, KeyError) and error.args and isinstance(error.args[0], str):
        return error.args[0]
    found = re.search(r"No match for FieldRef.Name\(([^)]+)\)", str(error))
    return found[1] if found else None


def _no_field(name: str, known: Iterable[str]) -> ConfigError:
    near = difflib.get_close_matches(name, sorted(known), n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}?" if near else f"use one of {', '.join(FIELDS)}."
    return ConfigError(f"`where` uses {name!r}, but there is no such field: {hint}")


def _parsed(table: pa.Table) -> Iterable[dict[str, Any]]:
    for batch in table.to_batches(max_chunksize=_BATCH):
        for fields in batch.to_pylist():
            yield fields | {"metadata": parse_json(fields["metadata"])}
