"""The examples that the protocols of models and sources open with: they run as they stand."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

import latentmill as lm
from latentmill.models import base as model_base
from latentmill.sources import base as source_base
from latentmill.sources.reading import UnitReader
from support.examples import example


def test_the_model_encodes_a_corpus(
    tmp_path: Path, inline: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "means_model.py").write_text(example(model_base))
    monkeypatch.syspath_prepend(tmp_path)
    audio = np.random.default_rng(1).uniform(-0.5, 0.5, 4 * 21_001).astype(np.float32)
    (tmp_path / "corpus").mkdir()
    soundfile.write(tmp_path / "corpus" / "a.wav", audio, 8000, "FLOAT")
    model = "python:means_model:factory"
    store_folder = tmp_path / "store"
    summary = lm.encode(tmp_path / "corpus", store_folder, model=model, dtype="float32")
    assert summary.exit_code == 0
    store = lm.open(store_folder, trust_model=True)
    means = audio.reshape(-1, 4).mean(1)
    np.testing.assert_allclose(store["a"].latent[0], means, atol=1e-6)
    np.testing.assert_allclose(store.decode("a")[0], means.repeat(4), atol=1e-6)
    sys.modules.pop("means_model", None)


def test_the_source_gives_items_that_can_be_read(tmp_path: Path) -> None:
    for name in ("a", "b"):
        soundfile.write(tmp_path / f"{name}.wav", np.zeros(100), 8000)
    (tmp_path / "list.txt").write_text("b.wav\na.wav\nnotes.md\n")
    scope: dict[str, Any] = {}
    exec(example(source_base), scope)
    source = scope["ListedFiles"](tmp_path / "list.txt")
    items = list(source.items())
    assert [item.key for item in items] == ["b.wav", "a.wav"]
    assert source.ignored == {".md": 1}
    with UnitReader(items) as reader:
        for item in items:
            with reader.open(item) as media:
                assert media.read_at(0, media.size) == (tmp_path / item.key).read_bytes()
