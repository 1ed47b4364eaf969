"""Annotations with more than 2 GiB of text, which one Arrow array cannot have."""

from __future__ import annotations

import json
import random
import string
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from latentmill.curation import annotation_table
from latentmill.curation.annotation_table import merged
from latentmill.store.annotations import Annotations

COUNT, LENGTH = 2100, 1 << 20
KEYS = [f"song {n:05d}" for n in range(COUNT)]
ALL_TEXT = "".join(random.Random(0).choices(string.ascii_letters, k=LENGTH + COUNT))


def large_texts() -> pa.ChunkedArray:
    """A column in which row n is `text(n)`. All rows are in the same 1 MiB of memory."""
    data = pa.py_buffer(ALL_TEXT.encode())
    places = (np.array([n, n + LENGTH], np.int32) for n in range(COUNT))
    chunks = [pa.StringArray.from_buffers(1, pa.py_buffer(place), data) for place in places]
    return pa.chunked_array(chunks)


def text(row: int) -> str:
    return ALL_TEXT[row : row + LENGTH]


def test_values_of_a_large_column() -> None:
    annotations = Annotations(pa.table({"key": KEYS, "lyrics": large_texts()}))
    for row in (0, COUNT // 2, COUNT - 1):
        assert annotations.values(KEYS[row]) == {"lyrics": text(row)}
    assert annotations.values("another song") == {}


def test_long_texts_are_read_in_short_arrays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(annotation_table, "_TEXT", 1000)
    rows = [{"key": f"song {n:03d}", "lyrics": "la " * 100, "n": n} for n in range(20)]
    (tmp_path / "new.jsonl").write_text("\n".join(map(json.dumps, rows)))
    table = annotation_table.read_table(f"{tmp_path}/new.jsonl", None).table
    assert max(map(len, table["lyrics"].chunks)) <= 4
    assert table.select(["key", "lyrics", "n"]).to_pylist() == rows


@pytest.mark.slow
def test_large_columns_are_merged() -> None:
    """Needs 5 GiB of memory: the column, and its rows in the order of the keys."""
    new = pa.table({"key": KEYS[::-1], "lyrics": large_texts()})
    old = pa.table({"key": [*KEYS[:2], "a song"], "lyrics": ["la", "la", "la"], "bpm": [1, 2, 3]})
    table = merged(old, new)
    assert table["key"].to_pylist() == ["a song", *KEYS]
    assert table["bpm"].to_pylist() == [3, 1, 2] + [None] * (COUNT - 2)
    assert table["lyrics"][0].as_py() == "la"
    for row in range(0, COUNT, 100):
        assert table["lyrics"][row + 1].as_py() == text(COUNT - 1 - row)
