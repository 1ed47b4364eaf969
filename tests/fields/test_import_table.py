from __future__ import annotations

import sqlite3
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from latentmill.errors import SourceError, StorageError
from latentmill.fields.import_table import ImportTable
from latentmill.fields.imported import ImportedValues
from latentmill.store.schema import Commit, ItemEntry


def test_a_value_that_does_not_fit_is_an_error_for_users() -> None:
    table = ImportTable()
    table._db.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, 1000)
    with pytest.raises(StorageError, match="Cannot keep imported values"):
        table.add([("song", np.zeros(2000, np.float32), None)])


def test_more_keys_than_a_query_takes() -> None:
    table = ImportTable()
    keys = [f"song {n}" for n in range(2500)]
    table.add((key, np.full(1, n, np.float32), None) for n, key in enumerate(keys))
    found = table.find(keys[::-1])
    assert sorted(found) == sorted(keys)
    assert all(table.value(key) == [n] for n, key in enumerate(keys[:3]))
    assert table.unknown(keys[5:], most=2) == (5, ["song 0", "song 1"])


@pytest.mark.parametrize("after", [np.ones(3, np.float32), np.zeros(4, np.float32)])
def test_a_file_that_changes_while_it_is_imported(
    tmp_path: Path, after: np.ndarray[Any, Any]
) -> None:
    np.save(tmp_path / "song.npy", np.zeros(3, np.float32))
    values = ImportedValues(str(tmp_path), "mine")
    np.save(tmp_path / "song.npy", after)
    base = Commit.model_construct(items=[ItemEntry.model_construct(key="song", status="encoded")])
    with pytest.raises(SourceError, match="was changed while it was imported"):
        list(values.read(base, ["song"]))
