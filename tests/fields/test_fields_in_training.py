"""Fields that `add` has made, read for training."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import latentmill as lm
from latentmill.errors import ConfigError
from latentmill.models import embedder as protocol
from latentmill.models.embedder import EmbedderSpec
from support import runs
from support.examples import example
from support.fields import added
from support.in_process import encode

CROP = 10


class Halves:
    """Every second frame of a latent."""

    spec = EmbedderSpec("halves", "frames", "latents", dimensions=64, stride=2)

    def load(self, device: str) -> Halves:
        return self

    def embed(self, values: Any) -> list[Any]:
        return [np.ascontiguousarray(value[:, ::2]) for value in values]


vowels = types.ModuleType("vowels_to_read")
halves = types.ModuleType("halves_to_read")
sys.modules |= {module.__name__: module for module in (vowels, halves)}
exec(example(protocol), vowels.__dict__)
halves.factory = Halves  # type: ignore[attr-defined]


def add_all(store: Path) -> None:
    added(store)
    for name, model, source in (
        ("text", "python:vowels_to_read:factory", "metadata:prompt"),
        ("halves", "python:halves_to_read:factory", "latents"),
    ):
        lm.add(store, field=name, model=model, source=source, device="cpu")


def test_fields_of_audio_texts_and_latents(songs: Path, tmp_path: Path) -> None:
    for number, path in enumerate(sorted(songs.rglob("*.wav"))[:-1]):  # the last has no prompt
        path.with_suffix(".json").write_text(json.dumps({"prompt": "aeiou" * number}))
    store = tmp_path / "store"
    encode(songs, store, unit_seconds=3.0)
    add_all(store)
    names = ["second", "text", "halves"]
    assert lm.open(store).fields == sorted(names)
    with pytest.raises(ConfigError, match="has no value for 1 of 5 records"):
        lm.LatentDataset(store, fields=names)
    dataset = lm.LatentDataset(store, crop=CROP, fields=names, missing_fields="leave_out")
    assert len(dataset) == 4
    base = lm.open(store)
    second = {record.key: record.latent.astype(np.float32) for record in base.field("second")}
    for epoch in range(10):
        dataset.set_epoch(epoch)
        for sample in dataset.__getitems__(range(4)):
            start = round(sample.metadata["seconds_start"] * 44100 / 64)
            assert sample.fields["text"].values.tolist() == [len(sample.metadata["prompt"]) / 5] * 5
            half = sample.fields["halves"].values
            first = (start + 1) // 2  # of a crop of 10 frames: 5 whole ones, the later of two
            whole = base[sample.key].latent.astype(np.float32)[:, ::2]
            assert np.array_equal(half, whole[:, first : first + 5])
            rate = 64 * 16000 / (44100 * 100)
            first = int(np.floor((start + CROP / 2) * rate - 3 / 2 + 0.5))
            assert sample.fields["second"].values.shape[1] == 3 == np.ceil(CROP * rate)
            wanted = second[sample.key][:, first : first + 3]
            assert np.array_equal(sample.fields["second"].values[:, : wanted.shape[1]], wanted)
    dropped = lm.LatentDataset(
        store, fields=["text"], missing_fields="leave_out", transforms=[lm.Drop("text", 1.0)]
    )
    assert not lm.collate(dropped.__getitems__(range(4)))["fields"]["text"].values.any()


@pytest.mark.filterwarnings("ignore:field .* may be out of date")
def test_a_store_that_was_extended(songs: Path, store: Path) -> None:
    """New items have no value until the same `add` runs again."""
    added(store)
    runs.write_songs(songs, 2, first=20)
    encode(songs, store, unit_seconds=3.0, extend=True)
    with pytest.raises(ConfigError, match="no value for 2 of 7 records") as error:
        lm.LatentStream(store, crop=CROP, fields=["second"])
    assert "latentmill add" in str(error.value)
    assert len(lm.LatentDataset(store, fields=["second"], missing_fields="leave_out")) == 5
    added(store)
    dataset = lm.LatentDataset(store, crop=CROP, fields=["second"])
    assert lm.collate(dataset.__getitems__(range(7)))["fields"]["second"].values.shape == (
        7,
        100,
        3,
    )
