"""The annotations of a view: those of its stores, and those that were annotated on the view."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import xxhash

from latentmill.curation.annotation_table import EMPTY, merged, with_values
from latentmill.curation.chosen import Chosen
from latentmill.encoding.stored import parse_json
from latentmill.errors import ConfigError
from latentmill.storage.storage import Storage
from latentmill.store.annotations import (
    JSON,
    Annotations,
    annotation_entry,
    annotation_file,
    annotation_path,
    kind_of,
    open_annotations,
    refreshed_versions,
)
from latentmill.store.entries import AnnotationEntry
from latentmill.store.schema import DatasetInfo


def write_view_annotations(
    storage: Storage, chosen: Sequence[Chosen], before: DatasetInfo | None, *, keep: bool
) -> tuple[Annotations | None, AnnotationEntry | None]:
    """Write the annotations of the chosen records, as the next version if those of a view change.

    Values annotated on the replaced view stay, except where a store has a value for the same key
    and name: that value replaces them. With `keep`, a store value that would change the view raises
    ConfigError. The first result is None if there are only values of the stores.
    """
    table = EMPTY
    for one in chosen:
        table = merged(table, _of_chosen(one))
    entry = None if before is None else before.annotation
    if entry is None and not len(table):
        return None, None
    if entry is not None:
        names = [one.prefix + key for one in chosen for key in one.index.keys(one.rows)]
        keys = pa.array(names, pa.string())
        current = open_annotations(storage, entry).table
        current = current.filter(pc.is_in(current["key"], value_set=keys))
        kept = merged(table, current)
        table = merged(_own_values(storage, entry, current), table)
        if keep and not _same_values(table, kept):
            raise ConfigError(
                f"{storage.root} is a view already, and its bases have other metadata for some of "
                "its records: use --overwrite to take the values of the bases."
            )
    data, annotations = annotation_file(table), Annotations(table)
    if entry is not None and xxhash.xxh3_128_hexdigest(data) == entry.hashes[-1]:
        return annotations, entry
    storage.write(annotation_path(1 if entry is None else entry.version + 1), data)
    own_values = None if entry is None else annotations
    return own_values, annotation_entry(entry, data, annotations, refreshed=True)


def _of_chosen(one: Chosen) -> pa.Table:
    """The annotations of a store for its chosen records, by their keys in the view."""
    if one.store.annotations is None:
        return EMPTY
    keys = one.index.key_array().take(pa.array(one.rows))
    table = one.store.annotations.table
    table = table.filter(pc.is_in(table["key"], value_set=keys))
    if one.prefix:
        prefixed = pc.binary_join_element_wise(one.prefix, table["key"], "")
        table = table.set_column(0, table.schema.field(0), prefixed)
    return table


def _own_values(storage: Storage, entry: AnnotationEntry, current: pa.Table) -> pa.Table:
    """The annotations of a view without the values that it has from its bases.

    The files of a version that was written with the view, and of the one before, show what they
    are. If these were deleted, or an earlier version of latentmill wrote them, the values stay.
    """
    own = current
    for before, after in refreshed_versions(storage, entry):
        tables = (current, after.table, EMPTY if before is None else before.table)
        for place, name in enumerate(current.column_names[1:], start=1):
            of_base = [
                now == then != earlier
                for now, then, earlier in zip(
                    *(_values(table, name, current["key"]) for table in tables),
                    strict=True,
                )
            ]
            left = pc.if_else(
                pa.array(of_base, pa.bool_()), pa.scalar(None, own[place].type), own[place]
            )
            own = own.set_column(place, own.schema.field(place), left)
    return with_values(own)


def _values(table: pa.Table, name: str, keys: pa.ChunkedArray) -> list[Any]:
    """The values of a name for some keys; None for keys without one."""
    if name not in table.column_names:
        return [None] * len(keys)
    values = table[name].to_pylist()
    if kind_of(table.schema.field(name)) == JSON:
        values = [None if text is None else parse_json(text) for text in values]
    rows = pc.index_in(keys, value_set=table["key"]).to_pylist()
    return [None if row is None else values[row] for row in rows]


def _same_values(one: pa.Table, other: pa.Table) -> bool:
    """Whether two tables have equal values; 1 and 1.0 are equal."""
    try:
        return bool(one.equals(other.cast(one.schema)))
    except (pa.ArrowInvalid, ValueError):  # ValueError: of other names
        return False
