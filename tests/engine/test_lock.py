"""The lock on a store on a local disk."""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Callable
from pathlib import Path

import pytest

import latentmill as lm
from latentmill.engine.lock import Membership, only_run
from latentmill.errors import ConfigError, StorageError
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


def test_a_worker_does_not_make_the_folder_of_a_store(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"not mounted/store does not exist on \S+: mount"):
        Membership(Storage(str(tmp_path / "not mounted" / "store")))
    assert list(tmp_path.iterdir()) == []


def test_a_worker_removes_what_killed_ones_left_on_its_disk() -> None:
    """For a bucket, shards are written to the worker's own TMPDIR first."""
    storage = Storage(f"memory://{uuid.uuid4().hex}")
    storage.scratch_folder.mkdir()
    left = storage.scratch_folder / f"{uuid.uuid4().hex}.shards.000000.parquet"
    left.write_bytes(b"half")
    with storage.scratch_file("shards/000001.parquet") as written:
        Membership(storage)
        assert written.exists()
        assert not left.exists()


def test_no_store_is_written_on_the_hub(
    tmp_path: Path, one_sentence: Callable[[BaseException], str]
) -> None:
    """The lease of a run, which is renewed every few seconds, would be a commit each time."""
    url = "hf://datasets/me/latents"
    with pytest.raises(ConfigError) as caught, only_run(Storage(url)):
        pass
    assert f"run `latentmill push STORE {url}`" in one_sentence(caught.value)
    with pytest.raises(ConfigError, match="latentmill push"):
        lm.encode(tmp_path, url, model="no such model")
