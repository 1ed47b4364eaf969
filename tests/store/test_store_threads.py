"""One open store that several threads use at the same time."""

from __future__ import annotations

import copy
import pickle
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from store_files import write_store

import latentmill as lm
from latentmill.models.base import Autoencoder
from latentmill.store import decoder, field_view, fields
from latentmill.store.schema import FIELD_NAMES
from latentmill.store.store import LatentStore
from support.field_stores import write_fields
from support.latent_store import write_again, write_latents


@pytest.mark.parametrize("kept", [1, 2])
def test_threads_read_the_fields_of_shards_that_the_others_drop(
    stores: dict[str, Path], monkeypatch: pytest.MonkeyPatch, kept: int
) -> None:
    """Some shards are kept, and every thread needs all of them."""
    store = LatentStore(stores["parquet"], device="cpu")
    shards, number = store.index.shards, store.index.column("shard")
    wanted = {shard: store.index.key(list(number).index(n)) for n, shard in enumerate(shards)}
    rows = {shard: store.entry(key).row for shard, key in wanted.items()}
    tables = {shard: fields.read_columns(store.storage, shard, FIELD_NAMES) for shard in shards}
    assert len(shards) > kept
    most = max(table.nbytes for table in tables.values())
    monkeypatch.setattr(fields, "_CACHED_BYTES", kept * most if kept > 1 else 1)

    def read_columns(storage: Any, path: str, names: Any) -> Any:
        time.sleep(0.0005)  # a thread that reads lets the others run
        return tables[path]

    monkeypatch.setattr(fields, "read_columns", read_columns)
    shared = fields.ShardFields(store.storage)

    def read(seed: int) -> None:
        for shard in np.random.default_rng(seed).choice(shards, 100).tolist():
            assert shared.row(shard, rows[shard])["key"] == wanted[shard]

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(read, range(16)))
    assert len(shared._tables) < len(shards)


def test_threads_that_decode_first_load_one_model(
    store: LatentStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[Autoencoder] = []
    real = decoder.load_model

    def slowly(*arguments: Any) -> Autoencoder:
        time.sleep(0.3)  # so that the other threads ask for the model meanwhile
        loaded.append(real(*arguments))
        return loaded[-1]

    monkeypatch.setattr(decoder, "load_model", slowly)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: store.decode("drums"), range(4)))
    assert len(loaded) == 1
    assert all(np.array_equal(audio, found[0]) for audio in found)


def test_a_thread_that_reads_a_new_seal_waits_for_the_one_that_does(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While a thread replaces the seal, another one must not take the index of the old one."""
    url = str(tmp_path / "store")
    write_store(url, corpus, exclude=("drums*",))
    store = LatentStore(url, device="cpu")
    before = list(store.keys())
    shutil.rmtree(url)
    write_store(url, corpus)
    found: list[list[str]] = []

    def read() -> None:
        store.reload()
        found.append(list(store.keys()))

    thread = threading.Thread(target=read)
    use_seal = store._use_seal

    def replace(info: Any) -> None:
        use_seal(info)
        thread.start()
        thread.join(0.5)  # longer than it needs if it does not wait

    monkeypatch.setattr(store, "_use_seal", replace)
    assert store.reload()
    thread.join()
    (keys,) = found
    assert keys == list(store.keys())
    assert len(keys) > len(before)


def test_copies_of_a_store_share_its_model_and_index(store: LatentStore) -> None:
    model, index = store.model(), store.index
    wanted = store["drums"]
    copied = copy.deepcopy(store)
    assert copied.model() is model
    assert copied.index is index
    assert copied._shard_fields is not store._shard_fields
    for other in (copied, copy.copy(store), pickle.loads(pickle.dumps(store))):
        assert other["drums"].metadata == wanted.metadata
        np.testing.assert_array_equal(other.decode("drums"), store.decode("drums"))


def test_copies_of_the_fields_of_shards_have_read_nothing(store: LatentStore) -> None:
    read = store._shard_fields
    wanted = store["drums"]
    entry = store.entry("drums")
    for other in (copy.deepcopy(read), copy.copy(read), pickle.loads(pickle.dumps(read))):
        assert not other._tables
        if entry.fields_offset < 0:
            assert other.row(entry.shard, entry.row)["content_hash"] == wanted.content_hash


def test_threads_read_a_field_of_a_view_that_is_sealed_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = write_latents(str(tmp_path / "store"), [20] * 16)
    write_fields(store, [20] * 16, names=["whole"])
    lm.select(store.url, tmp_path / "view", where="number < 12")
    field, keys = lm.open(tmp_path / "view").field("whole"), [f"item/{n:05d}" for n in range(8)]
    assert len(field) == 12
    own = lm.open(f"{store.url}/fields/whole")
    latents = [own[f"item/{n:05d}"].latent for n in range(16)]
    write_again(own.url, [0, 1], latents)
    real = field_view._fields

    def as_slow_as_s3(*given: Any) -> Any:
        time.sleep(0.1)
        return real(*given)

    monkeypatch.setattr(field_view, "_fields", as_slow_as_s3)
    with ThreadPoolExecutor(len(keys)) as pool:
        found = list(pool.map(lambda key: field[key].latent, keys))
    assert all(np.array_equal(one, two) for one, two in zip(found, latents, strict=False))
