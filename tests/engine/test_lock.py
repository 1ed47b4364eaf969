"""The lock on a store on a local disk."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from latentmill.engine.lock import only_run
from latentmill.errors import StorageError
from latentmill.storage.storage import Storage


def test_the_error_of_a_run_whose_store_was_removed_is_not_hidden(tmp_path: Path) -> None:
    store = tmp_path / "store"
    with pytest.raises(StorageError, match="it was removed"), only_run(Storage(str(store))):
        shutil.rmtree(store)
        raise StorageError(f"Cannot write {store}: it was removed.")
    with only_run(Storage(str(store))):
        shutil.rmtree(store)
    with only_run(Storage(str(store))):
        assert store.is_dir()
    assert not store.exists()
