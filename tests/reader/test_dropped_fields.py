"""Readers of a field that is dropped and added again: values of one field, or an error."""

from __future__ import annotations

import pickle
import uuid
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import latentmill as lm
from latentmill.errors import StoreError
from latentmill.storage.storage import Storage
from support.fields import write_import
from support.latent_store import write_again, write_latents

KEYS = [f"item/{number:05d}" for number in range(16)]  # two units of eight
REPLACED = "was replaced by another store or field.*open it again"
OPTIONS = {"crop": 8, "mode": "start", "fields": ["emb"]}
Add = Callable[[int, str], None]


@pytest.fixture(params=["local", "memory"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    local = request.param == "local"
    place = str(tmp_path / "store") if local else f"memory://{uuid.uuid4().hex}/store"
    return write_latents(place, [30] * 16).url


@pytest.fixture
def add(url: str, tmp_path: Path) -> Add:
    """Adds a field of vectors that tell the item and `first`."""

    def add_vectors(first: int, dtype: str) -> None:
        rows = {key: vector(first, number).tolist() for number, key in enumerate(KEYS)}
        path = write_import(tmp_path / "emb.parquet", rows)
        lm.add(url, field="emb", source=str(path), dtype=dtype)

    return add_vectors


def vector(first: int, number: int) -> np.ndarray:
    """Exact in float16."""
    return np.float32(first + number) + np.arange(4, dtype=np.float32) / 8


def test_other_settings_are_refused(url: str, add: Add, tmp_path: Path) -> None:
    add(0, "float32")
    early = lm.LatentDataset(url, **OPTIONS)
    cached = lm.LatentDataset(url, **OPTIONS, cache=tmp_path / "cache")
    field = lm.open(url).field("emb")
    for dataset in (early, cached):
        np.testing.assert_array_equal(dataset[1].fields["emb"].values, vector(0, 1))
    assert field["item/00001"].key
    copy = pickle.dumps(early)
    lm.drop(url, field="emb")
    add(100, "float16")
    for dataset in (early, cached):
        with pytest.raises(StoreError, match=REPLACED):
            dataset[9]
    with pytest.raises(StoreError, match=REPLACED):
        pickle.loads(copy)
    for read in (lambda: field["item/00009"], lambda: field.crop("item/00009", 0, 1)):
        with pytest.raises(StoreError, match=REPLACED):
            read()
    late = lm.LatentDataset(url, **OPTIONS, cache=tmp_path / "cache")
    for number in (1, 9):
        np.testing.assert_array_equal(late[number].fields["emb"].values, vector(100, number))


def test_a_field_of_a_view(url: str, add: Add) -> None:
    add(0, "float32")
    view = f"{url}-view"
    lm.select(url, view, keys=[KEYS[1], KEYS[9]])
    dataset = lm.LatentDataset(view, **OPTIONS)
    lm.drop(url, field="emb")
    add(100, "float16")
    with pytest.raises(StoreError, match=REPLACED):
        dataset[1]


def test_the_same_settings_are_followed(url: str, add: Add) -> None:
    """As if the same `add` had imported the changed file."""
    add(0, "float32")
    dataset = lm.LatentDataset(url, **OPTIONS)
    copy = pickle.dumps(dataset)
    lm.drop(url, field="emb")
    add(100, "float32")
    for one in (dataset, pickle.loads(copy)):
        for number in (1, 9):
            np.testing.assert_array_equal(one[number].fields["emb"].values, vector(100, number))


def test_a_field_that_is_brought_up_to_date_is_followed(url: str, add: Add) -> None:
    add(0, "float32")
    dataset = lm.LatentDataset(url, **OPTIONS)
    add(100, "float32")
    write_again(f"{url}/fields/emb", [], [np.zeros((4, 1), np.float16)] * 16)  # tidies, as `add`
    np.testing.assert_array_equal(dataset[9].fields["emb"].values, vector(100, 9))


def test_a_shard_of_another_size_under_the_old_name(url: str, add: Add) -> None:
    """Of a field that was dropped by a version that left no number for the names."""
    add(0, "float32")
    dataset = lm.LatentDataset(url, **OPTIONS)
    before = Storage(f"{url}/fields/emb").list("shards")
    lm.drop(url, field="emb")
    Storage(url).delete("fields/emb.dropped")
    add(100, "float16")
    now = Storage(f"{url}/fields/emb").list("shards")
    assert before.keys() == now.keys() and before != now
    with pytest.raises(StoreError, match=REPLACED):
        dataset[9]
