"""The records of a base store, unit by unit: their metadata, and their stored fields."""

from __future__ import annotations

from collections import OrderedDict
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from latentmill.encoding.stored import parse_json
from latentmill.storage.storage import Storage
from latentmill.store.index import Index, to_batch
from latentmill.store.metadata import shard_rows
from latentmill.store.metadata_file import damaged_metadata, metadata_of
from latentmill.store.schema import Commit
from latentmill.store.store import LatentStore

Rows = npt.NDArray[np.int64]

KEPT_BYTES = 64 << 20  # of row groups of the metadata file
# Rows of the metadata file that may be read: `FIRST_ROWS`, and `ROWS_FOR_ONE` per requested row.
ROWS_FOR_ONE, FIRST_ROWS = 16, 1 << 16


def rows_of(storage: Storage, commit: Commit) -> pa.Table:
    """The rows of a unit's records, from its shard; see `metadata.shard_rows`."""
    index = Index.from_batches([to_batch(commit)])
    return shard_rows(storage, index, 0, np.arange(len(index)))


class BaseRows:
    """The rows of committed units; a few units and row groups are in memory.

    The metadata is read from the metadata file of the seal, whose row n is record n. The rows of a
    unit are usually next to each other in this file. They are not for units of an extension, or if
    the plan follows the rows of a table instead of the keys. If too many other rows would be read
    for a unit, or the seal does not have it, its shard is read instead.

    Args:
        store: The base store.
        from_shards: Read only shards. For processes that read few units of a store in a bucket:
            the index and the metadata file would take longer, and need memory for all records.
    """

    def __init__(self, store: LatentStore, *, from_shards: bool = False) -> None:
        self._store, self._from_shards = store, from_shards
        self._kept: OrderedDict[int, pa.Array] = OrderedDict()
        self._allowed = FIRST_ROWS

    def metadata(self, commit: Commit) -> dict[str, dict[str, Any]]:
        """The metadata of a unit's records by key, with annotated values."""
        if commit.shard is None:
            return {}
        texts = self._of_file(commit.shard)
        if texts is None:
            texts = self._of_shard(commit)
        return {key: parse_json(text) for key, text in texts.items()}

    def fields(self, commit: Commit) -> dict[str, dict[str, Any]]:
        """The stored fields of a unit's records by key."""
        if commit.shard is None:
            return {}
        return {row["key"]: row for row in rows_of(self._store.storage, commit).to_pylist()}

    def _of_shard(self, commit: Commit) -> dict[str, str]:
        rows, annotations = rows_of(self._store.storage, commit), self._store.annotations
        texts = zip(rows["key"].to_pylist(), rows["metadata"].to_pylist(), strict=True)
        if annotations is None:
            return dict(texts)
        return {key: annotations.merged(key, text) for key, text in texts}

    @cached_property
    def _sealed(self) -> _Sealed | None:
        """None if shards are to be read, or the store has no metadata file; see `metadata_of`."""
        if self._from_shards or not self._store.sealed or self._store.info.metadata is None:
            return None
        file = metadata_of(self._store)  # first: the store may be sealed again meanwhile
        return _Sealed(file, self._store.index)

    def _of_file(self, shard: str) -> dict[str, str] | None:
        """The metadata from the metadata file, as JSON; None if the shard is to be read."""
        if self._sealed is None or shard not in self._sealed.shards:
            return None
        positions = self._sealed.positions(shard)
        groups = self._sealed.groups(positions)
        needed = np.unique(groups).tolist()
        self._allowed += ROWS_FOR_ONE * len(positions)
        rows = sum(self._sealed.rows(group) for group in needed if group not in self._kept)
        if rows > self._allowed:
            return None
        self._allowed -= rows
        found: dict[str, str] = {}
        for group in needed:
            here = positions[groups == group]
            places = pa.array(here - self._sealed.first[group])
            texts = self._group(group).take(places).to_pylist()
            found |= zip(self._sealed.index.keys(here), texts, strict=True)
        return found

    def _group(self, group: int) -> pa.Array:
        """The metadata in a row group, and those used last."""
        assert self._sealed is not None
        if group not in self._kept:
            try:
                table = self._sealed.file.read_row_group(group, ["metadata"], use_threads=False)
                # Rows of more than 2 GiB cannot be in one array with offsets of 32 bits.
                self._kept[group] = table["metadata"].cast(pa.large_string()).combine_chunks()
            except (OSError, ValueError, pa.ArrowException) as error:
                raise damaged_metadata(self._store) from error
            while len(self._kept) > 1 and sum(a.nbytes for a in self._kept.values()) > KEPT_BYTES:
                self._kept.popitem(last=False)
        self._kept.move_to_end(group)
        return self._kept[group]


class _Sealed:
    """Where the rows of each shard are in the metadata file."""

    def __init__(self, file: pq.ParquetFile, index: Index) -> None:
        self.file, self.index = file, index
        self.shards = {path: number for number, path in enumerate(index.shards)}
        self._order, self._ends = index.by_shard()
        counts = [file.metadata.row_group(n).num_rows for n in range(file.num_row_groups)]
        self.first = np.cumsum([0, *counts])

    def positions(self, shard: str) -> Rows:
        number = self.shards[shard]
        return np.sort(self._order[self._ends[number] : self._ends[number + 1]])

    def groups(self, positions: Rows) -> Rows:
        """The row group of each row."""
        return np.searchsorted(self.first, positions, "right") - 1

    def rows(self, group: int) -> int:
        return int(self.first[group + 1] - self.first[group])
