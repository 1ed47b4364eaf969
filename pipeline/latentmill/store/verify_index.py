"""Checking that an index has the places of all records."""

from __future__ import annotations

from collections.abc import Iterable

import pyarrow as pa

from latentmill.store.index import Index, entries, to_batch
from latentmill.store.schema import Commit


def misplaced(index: Index, commits: Iterable[Commit]) -> str | None:
    """A key whose place in the index is not that in the commits; None if there is none.

    Compares the rows of a shard at once, and searches for keys only if they differ.

    Raises:
        StoreError: The index is damaged.
    """
    order, ends = index.by_shard()
    numbers = {path: number for number, path in enumerate(index.shards)}
    ascending = _is_ascending(index.key_array())  # if not, a search may not find a key
    for commit in commits:
        wanted = pa.Table.from_batches([to_batch(commit)])
        number = numbers.get(commit.shard or "")
        if ascending and number is not None:
            rows = index.table.take(pa.array(order[ends[number] : ends[number + 1]]))
            if _by_row(rows).equals(_by_row(wanted)):
                continue
        for entry in entries(commit):
            position = index.find(entry.key)
            if position is None or index.entry(position) != entry:
                return entry.key
    return None


def _is_ascending(keys: pa.Array) -> bool:
    import pyarrow.compute as pc  # slow, and most commands do not need it

    return len(keys) < 2 or bool(pc.all(pc.less(keys[:-1], keys[1:])).as_py())


def _by_row(table: pa.Table) -> pa.Table:
    """Index rows in the order of the shard, with its path as a text."""
    paths = table["shard"].cast(pa.string())
    return table.set_column(1, "shard", paths).sort_by("row").combine_chunks()
