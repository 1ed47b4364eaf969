"""Options of the model that are chosen when a store is decoded."""

from __future__ import annotations

import dataclasses
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import soundfile

import latentmill as lm
from latentmill.errors import ModelError
from latentmill.models.registry import resolve
from latentmill.store.store import LatentStore
from store.store_files import write_store
from support import runs
from support.linear_cae_weights import use_cache, write_cache

pytest.importorskip("linear_cae")
FOUR = ("--model-option", "diffusion_steps=4")


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> LatentStore:
    write_cache(tmp_path / "hf_home")
    use_cache(monkeypatch, tmp_path / "hf_home")
    (tmp_path / "sounds").mkdir()
    noise = np.random.default_rng(0).standard_normal(44100) * 0.1
    soundfile.write(tmp_path / "sounds" / "a.wav", noise, 44100, subtype="FLOAT")
    return write_store(
        str(tmp_path / "store"), tmp_path / "sounds", model="lin-cae", model_options={}
    )


def test_steps_of_the_decoder(
    store: LatentStore, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    handle = dataclasses.replace(resolve("lin-cae"), diffusion_steps=4)
    opened = lm.open(store.url, model_options={"diffusion_steps": 4})
    expected = LatentStore(store.url)
    expected._model = handle.load("cpu")  # type: ignore[attr-defined]
    wanted = expected.decode("a", seed=3)
    assert np.array_equal(opened.decode("a", seed=3), wanted)
    assert np.array_equal(pickle.loads(pickle.dumps(opened)).decode("a", seed=3), wanted)
    assert not np.allclose(lm.open(store.url).decode("a", seed=3), wanted, atol=1e-3)
    done = runs.call(capsys, "decode", store.url, "a", "-o", tmp_path / "out", "--seed", 3, *FOUR)
    assert done.code == 0, done.err
    audio, _ = soundfile.read(tmp_path / "out" / "a.wav", dtype="float32")
    assert np.array_equal(audio, wanted[0])


def test_evaluation_records_them(store: LatentStore, capsys: pytest.CaptureFixture[str]) -> None:
    snr = []
    for options in ((), FOUR):
        arguments = ("--only", "reconstruction", "--json", *options)
        done = runs.call(capsys, "evaluate", store.url, *arguments)
        assert done.code == 0, done.err
        snr.append(json.loads(done.out)["reconstruction"]["items"][0]["snr"])
        path = Path(store.url, "evaluation", "reconstruction.json")
        recorded = json.loads(path.read_text()).get("model_options")
        assert recorded == ({"diffusion_steps": 4} if options else None)
    assert snr[0] != snr[1]
    page = Path(store.url).parent / "report.html"
    done = runs.call(capsys, "report", store.url, "-o", page, *FOUR)
    assert done.code == 0, done.err
    assert "1 record decoded with diffusion_steps=4 and compared" in page.read_text()
    assert "Decoded with diffusion_steps=4." in page.read_text()


def test_options_that_change_latents_are_refused(store: LatentStore, one_sentence) -> None:
    opened = lm.open(store.url, model_options={"scale_factor": 2.0})
    with pytest.raises(ModelError, match=r"scale_factor \S+ in the store, 2\.0 here") as error:
        opened.decode("a")
    one_sentence(error.value)
