"""The stored fields of all records of a shard, for either shard format."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from latentmill.store.fields import damaged_shard, parse_member, read_columns
from latentmill.store.store import LatentStore


class ShardRows:
    """The records of a store, shard by shard."""

    def __init__(self, store: LatentStore) -> None:
        self._store, self._index = store, store.index

    @property
    def paths(self) -> list[str]:
        """Paths of the shards, by number."""
        return self._index.shards

    @cached_property
    def _order(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        return self._index.by_shard()

    def positions(self, shard: int) -> npt.NDArray[np.int64]:
        """Positions in the index of a shard's records, in the order of its rows."""
        order, first = self._order
        return order[first[shard] : first[shard + 1]]

    def fields(self, shard: int, names: Sequence[str]) -> dict[str, list[Any]]:
        """Some fields of all records of a shard, as lists by name; None if a field is missing."""
        path, positions = self.paths[shard], self.positions(shard)
        columns = self._index.column
        begins, sizes = columns("fields_offset")[positions], columns("fields_length")[positions]
        if not len(positions):
            return {name: [] for name in names}
        if begins[0] < 0:
            try:
                table = read_columns(self._store.storage, path, names)
                if len(table) != len(positions):  # a view has some of the rows
                    table = table.take(pa.array(columns("row")[positions]))
            except (pa.ArrowException, OSError) as error:
                raise damaged_shard(self._store.storage, path) from error
            return {name: table[name].to_pylist() for name in names}
        pieces = [(path, int(b), int(n)) for b, n in zip(begins, sizes, strict=True)]
        storage = self._store.storage
        members = [parse_member(storage, path, piece) for piece in storage.read_ranges(pieces)]
        return {name: [member.get(name) for member in members] for name in names}

    def spread(self) -> Iterator[int]:
        """All shards, so that any number of the first ones is spread over the store."""
        count = len(self.paths)
        bits = max(1, (count - 1).bit_length())
        for number in range(1 << bits):
            shard = int(f"{number:0{bits}b}"[::-1], 2)
            if shard < count:
                yield shard
