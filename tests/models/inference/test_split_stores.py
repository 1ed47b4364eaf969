"""Stores of `--channels split` with standard deviations, of this version and of an earlier one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch

import latentmill as lm
from latentmill.errors import ModelError, StoreError
from latentmill.models.registry import resolve
from latentmill.reader.transforms import DrawFromPosterior
from support.in_process import in_process

OPTIONS = {"posterior": "mean+std"}


def encode(folder: Path, repo: Path) -> None:
    model: dict[str, Any] = {"model": f"minimax:{repo}", "model_options": OPTIONS}
    with in_process():
        lm.encode(
            folder / "in",
            folder / "store",
            channels="split",
            dtype="float32",
            device="cpu",
            chunk_seconds=0.5,
            **model,
        )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny_repos: Path) -> Path:
    folder = tmp_path_factory.mktemp("split")
    (folder / "in").mkdir()
    sound = np.random.default_rng(0).uniform(-1, 1, (8000, 2)) * (0.5, 0.05)
    soundfile.write(folder / "in" / "a.wav", sound, 32000, subtype="FLOAT")
    encode(folder, tiny_repos / "minimax")
    return folder


def test_readers_find_the_means_and_deviations_of_both_channels(
    folder: Path, tiny_repos: Path
) -> None:
    store = lm.open(folder / "store")
    sound, _ = soundfile.read(folder / "in" / "a.wav", dtype="float32")
    mono = resolve(f"minimax:{tiny_repos / 'minimax'}", OPTIONS).load("cpu")
    encoded = mono.encode(torch.from_numpy(sound.T.copy())[:, None]).numpy()
    means, deviations = (each.reshape(-1, each.shape[-1]) for each in np.split(encoded, 2, axis=1))
    assert store.origin.deviations == len(means)
    both = lm.mix([store["a"].latent] * 2, [0.5, 0.5], origin=store.origin)
    assert np.allclose(both[: len(means)], means, atol=1e-5)
    assert np.allclose(both[len(means) :], deviations / np.sqrt(2), rtol=1e-4)
    dataset = lm.LatentDataset(store, crop=None, transforms=[DrawFromPosterior()])
    noise = (dataset[0].latents - means) / deviations
    assert noise.shape == means.shape
    assert abs(noise).max() < 6
    assert noise.std() == pytest.approx(1, abs=0.3)


def test_latents_of_means_alone_are_decoded(folder: Path) -> None:
    """As a model generates them that was trained on draws."""
    store = lm.open(folder / "store", device="cpu")
    stored, expected = store["a"].latent, store.decode("a")
    means = stored[: len(stored) // 2]
    normal = lm.Normalize.from_store(store, by="overall")
    generated = torch.from_numpy(normal.apply(means))[None]
    audio = store.decode_latent(normal.undo(generated), expected.shape[1])
    assert np.allclose(audio[0], expected, atol=1e-4)
    blocks = store.decode_blocks(means, expected.shape[1])
    assert np.array_equal(np.concatenate(list(blocks), axis=1), expected)
    with pytest.raises(ModelError, match="must have the shape"):
        store.decode_latent(stored[: len(stored) // 2 - 1])


def test_a_store_with_the_rows_of_an_earlier_version_is_refused(
    folder: Path, tiny_repos: Path, one_sentence: Callable[[BaseException], str]
) -> None:
    for path in (folder / "store" / "dataset.json", folder / "store" / "plan" / "plan.json"):
        text = path.read_text()
        assert '"split_rows"' in text
        path.write_text(json.dumps(_without(json.loads(text), "split_rows")))
    store = lm.open(folder / "store")
    assert store["a"].latent.any()
    for use in (
        lambda: store.origin,
        lambda: store.decode("a"),
        lambda: encode(folder, tiny_repos / "minimax"),
    ):
        with pytest.raises(StoreError, match="encoded by an earlier version") as caught:
            use()
        assert "encode into a new output folder" in one_sentence(caught.value)


def _without(value: Any, name: str) -> Any:
    if isinstance(value, dict):
        return {key: _without(each, name) for key, each in value.items() if key != name}
    return value
