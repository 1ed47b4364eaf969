"""The memory that imported values need does not grow with their number or size."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import latentmill as lm
from latentmill.fields import imported
from latentmill.fields.imported import ImportedValues
from latentmill.store.store import open_store
from support.fields import write_import
from support.in_process import encode
from support.runs import write_songs


def test_the_values_of_a_unit_are_not_in_memory_together(tmp_path: Path) -> None:
    songs, store = write_songs(tmp_path / "songs", 40, 0.1), tmp_path / "store"
    encode(songs, store, unit_seconds=60.0)
    opened = open_store(str(store))
    assert len(opened.info.shards) == 1
    shape, random = (1024, 128), np.random.default_rng(0)
    keys = list(opened.keys())
    rows = {key: random.standard_normal(shape).astype(np.float32) for key in keys}
    folder = write_import(tmp_path / "values", rows)
    options = {"source": str(folder), "device": "cpu", "batch_size": 2}
    lm.add(store, field="first", **options)  # imports what is slow to import
    tracemalloc.start()  # numpy's memory, too
    try:
        lm.add(store, field="second", **options)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < sum(value.nbytes for value in rows.values()) / 2
    found = open_store(str(store / "fields/second"))
    for key, value in rows.items():
        np.testing.assert_array_equal(found[key].latent, value.T.astype(np.float16))


@pytest.mark.parametrize("tokens", [False, True])
def test_rows_of_large_values_are_read_in_small_batches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tokens: bool
) -> None:
    count, shape = 64, (256, 512) if tokens else (256 * 512,)
    made = np.random.default_rng(0).standard_normal((count, *shape)).astype(np.float32)
    keys = [f"song {n}" for n in range(count)]
    kind = pa.list_(pa.list_(pa.float32())) if tokens else pa.list_(pa.float32())
    table = pa.table({"key": keys, "own": pa.array(made.tolist(), kind)})
    pq.write_table(table, tmp_path / "v.parquet")
    monkeypatch.setattr(imported, "_VALUE_BYTES", 4 * made[0].nbytes)
    before = pa.default_memory_pool()
    pool = pa.proxy_memory_pool(before)
    pa.set_memory_pool(pool)
    try:
        values = ImportedValues(str(tmp_path / "v.parquet"), "own")
    finally:
        pa.set_memory_pool(before)
    assert pool.max_memory() < made.nbytes / 2
    np.testing.assert_array_equal(values._table.value("song 63"), made[63])
