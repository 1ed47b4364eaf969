"""The metadata file of a view, from those of its stores."""

from __future__ import annotations

import contextlib
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence, Set

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from latentmill.curation.chosen import Chosen
from latentmill.encoding.stored import parse_json
from latentmill.errors import StoreError
from latentmill.storage.storage import Storage, writing
from latentmill.store.fields import with_prefix
from latentmill.store.metadata import (
    METADATA_SCHEMA,
    PREFIX,
    ROW_GROUP,
    ColumnKinds,
    publish,
    schema_of,
    with_columns,
)
from latentmill.store.metadata_file import damaged_metadata, metadata_of


def write_view_metadata(storage: Storage, chosen: Sequence[Chosen]) -> tuple[str, str]:
    """Write the metadata file from those of the stores; return its name and hash."""
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(metadata_of(one.store)) for one in chosen]
        schema, kinds = _common_schema(files, chosen)
        temporary = stack.enter_context(storage.scratch_file("metadata.parquet"))
        with (
            writing(str(temporary)),
            pq.ParquetWriter(temporary, schema, compression="zstd") as out,
        ):
            pairs = zip(files, chosen, strict=True)
            parts = [_rows_of(file, one, schema, kinds) for file, one in pairs]
            for table in parts[0] if len(parts) == 1 else _in_order(parts, chosen):
                out.write_table(table, row_group_size=ROW_GROUP)
        return publish(storage, temporary)


def _in_order(parts: Sequence[Iterator[pa.Table]], chosen: Sequence[Chosen]) -> Iterator[pa.Table]:
    """The rows of all stores in the order of their keys, a row group at a time.

    Each part has its rows in order already, so a row group takes the next rows of some parts.
    """
    keys = [one.index.key_array().take(pa.array(one.rows)) for one in chosen]
    prefixed = (
        pc.binary_join_element_wise(one.prefix, own, "")
        for one, own in zip(chosen, keys, strict=True)
    )
    order = pc.sort_indices(pa.chunked_array(list(prefixed), pa.string())).to_numpy()
    ends = np.cumsum([len(one.rows) for one in chosen])
    of_row = np.searchsorted(ends, order, "right").astype(np.int32)
    del keys, order
    waiting: list[list[pa.Table]] = [[] for _ in parts]
    for start in range(0, len(of_row), ROW_GROUP):
        wanted = of_row[start : start + ROW_GROUP]
        taken = []
        for part, count in enumerate(np.bincount(wanted, minlength=len(parts)).tolist()):
            some = waiting[part]
            while sum(map(len, some)) < count:
                some.append(next(parts[part]))
            if count:
                rows = pa.concat_tables(some)
                taken.append(rows.slice(0, count))
                waiting[part] = [rows.slice(count)]
        place = np.empty(len(wanted), np.int64)  # of each row in `taken`
        place[np.argsort(wanted, kind="stable")] = np.arange(len(wanted))
        yield pa.concat_tables(taken).take(pa.array(place))


def _rows_of(
    file: pq.ParquetFile, one: Chosen, schema: pa.Schema, kinds: Mapping[str, str]
) -> Iterator[pa.Table]:
    """The rows of the chosen records in the order of their keys, a row group at a time.

    The columns of the names in `kinds` are made from the JSON.
    """
    start, keys = 0, one.index.key_array()
    for group in range(file.num_row_groups):
        table = file.read_row_group(group, use_threads=False)
        first, last = np.searchsorted(one.rows, [start, start + len(table)])
        rows = one.rows[first:last] - start
        start += len(table)
        if not len(rows):
            continue
        table = table.take(pa.array(rows))
        if not table["key"].combine_chunks().equals(keys.take(pa.array(one.rows[first:last]))):
            raise StoreError(
                f"{one.store.url} was changed while it was read: run the command again."
            )
        table = with_prefix(table, one.prefix)
        made = with_columns(table.select(METADATA_SCHEMA.names), kinds)
        columns = {name: table[name] for name in table.column_names}
        columns |= {name: made[name] for name in made.column_names}
        missing = (field for field in schema if field.name not in columns)
        columns |= {field.name: pa.nulls(len(table), field.type) for field in missing}
        yield pa.table({name: columns[name] for name in schema.names}).cast(schema).combine_chunks()


def _common_schema(
    files: Sequence[pq.ParquetFile], chosen: Sequence[Chosen]
) -> tuple[pa.Schema, dict[str, str]]:
    """The columns of the records of all files, and the kinds of those that are made from the JSON.

    These are the names whose columns have several types, or that a file has in its JSON only.
    """
    types: dict[str, set[pa.DataType]] = {}
    for field in (field for file in files for field in file.schema_arrow):
        if field.name not in METADATA_SCHEMA.names:
            types.setdefault(field.name, set()).add(field.type)
    unclear = {name for name, found in types.items() if len(found) > 1}
    for file in files:
        missing = types.keys() - unclear - set(file.schema_arrow.names)
        unclear |= _in_json(file, missing) if missing else set()
    kinds = _kinds(files, chosen, {name.removeprefix(PREFIX) for name in unclear})
    own = [pa.field(name, *found) for name, found in types.items() if name not in unclear]
    own += list(schema_of(kinds))[len(METADATA_SCHEMA) :]
    return pa.schema([*METADATA_SCHEMA, *sorted(own, key=lambda field: field.name)]), kinds


def _kinds(
    files: Sequence[pq.ParquetFile], chosen: Sequence[Chosen], names: Set[str]
) -> dict[str, str]:
    """The kinds that the columns of some names have in a store with the records of all files."""
    if not names:
        return {}
    annotated: dict[str, str] = {}
    for one in chosen:
        annotated |= {} if one.store.annotations is None else one.store.annotations.kinds
    found = ColumnKinds({name: annotated[name] for name in names & annotated.keys()})
    for file, one in zip(files, chosen, strict=True):
        try:
            for text in itertools.chain.from_iterable(_texts(file)):
                own = parse_json(text)
                found.add({name: own[name] for name in names & own.keys()})
        except (ValueError, TypeError, AttributeError) as error:
            raise damaged_metadata(one.store) from error
    return found.columns()


def _texts(file: pq.ParquetFile) -> Iterator[list[str]]:
    """The JSON of all records, a row group at a time."""
    for group in range(file.num_row_groups):
        table = file.read_row_group(group, columns=["metadata"], use_threads=False)
        yield table["metadata"].to_pylist()


def _in_json(file: pq.ParquetFile, columns: Set[str]) -> set[str]:
    """Those of some columns' names that the JSON of a record may have."""
    found = set[str]()
    for group in range(file.num_row_groups):
        texts = file.read_row_group(group, columns=["metadata"], use_threads=False)["metadata"]
        for column in columns - found:
            name = json.dumps(column.removeprefix(PREFIX), ensure_ascii=False)
            if pc.any(pc.match_substring(texts, name)).as_py():
                found.add(column)
    return found
