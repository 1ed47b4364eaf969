"""An index is compared with the commits shard by shard."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pytest

from latentmill.store.index import Index
from latentmill.store.store import LatentStore
from latentmill.store.verify_index import misplaced
from support.latent_store import write_latents


@pytest.fixture
def store(tmp_path: Path) -> LatentStore:
    return write_latents(str(tmp_path), [5] * 40, per_unit=8, failed=(3, 8, 9, 20))


def test_no_key_of_a_whole_index_is_searched_for(
    store: LatentStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: Index, key: str) -> None:
        raise AssertionError(key)

    monkeypatch.setattr(Index, "find", refuse)
    assert misplaced(store.index, store.commits.values()) is None


@pytest.mark.parametrize("name", ["row", "offset", "hash", "num_samples", "fields_offset", "shard"])
def test_a_row_with_another_value(store: LatentStore, name: str) -> None:
    rows = store.index.table.to_pylist()
    rows[17][name] = "shards/000000.parquet" if name == "shard" else rows[17][name] + 1
    index = Index(pa.Table.from_pylist(rows, store.index.table.schema))
    assert misplaced(index, store.commits.values()) == rows[17]["key"]


def test_rows_in_another_order(store: LatentStore) -> None:
    rows = store.index.table.to_pylist()
    rows[0], rows[20] = rows[20], rows[0]
    index = Index(pa.Table.from_pylist(rows, store.index.table.schema))
    assert misplaced(index, store.commits.values()) is not None


def test_a_shard_that_the_index_does_not_have(store: LatentStore) -> None:
    rows = store.index.table.to_pylist()[:-1]
    index = Index(pa.Table.from_pylist(rows, store.index.table.schema))
    assert misplaced(index, store.commits.values()) == "item/00039"
    assert misplaced(Index(store.index.table.slice(0, 0)), store.commits.values()) == "item/00000"
