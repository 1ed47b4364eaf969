"""Stores with `stitch: state`, and those that were planned with `trim` before it existed."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import soundfile

import latentmill
from latentmill.config import load_config
from latentmill.errors import ConfigError, StoreError
from latentmill.evaluation.seams import measure_seams
from latentmill.plan import PLAN_PATH
from latentmill.run.forecast import forecast
from latentmill.run.run import run
from latentmill.store.schema import DATASET_PATH
from latentmill.store.store import LatentStore
from latentmill.store.verify import verify
from support.in_process import in_process
from support.stateful_model import HOP, expected

CHUNK = 40 * HOP
LENGTHS = [3 * CHUNK + 5, CHUNK, 4 * CHUNK, 7, 2 * CHUNK + 1, 6 * CHUNK - 3]


@pytest.fixture
def sounds(tmp_path: Path) -> dict[str, np.ndarray]:
    folder = tmp_path / "sounds"
    folder.mkdir()
    made = {}
    for number, samples in enumerate(LENGTHS):
        random = np.random.default_rng(number)
        made[f"{number}"] = random.uniform(0, 0.1, samples).astype(np.float32)
        soundfile.write(folder / f"{number}.wav", made[f"{number}"], 8000, "FLOAT")
    return made


def options(tmp_path: Path, **more: object) -> dict[str, object]:
    return {
        "source": str(tmp_path / "sounds"),
        "out": str(tmp_path / "store"),
        "device": "cpu",
        "threads": 1,
        "model": "python:support.stateful_model:build",
        "dtype": "float32",
        "unit_seconds": 0.15,
        **more,
    }


def encoded(given: dict[str, object]) -> LatentStore:
    with in_process():
        run(load_config(None, given))
    return latentmill.open(str(given["out"]), trust_model=True)


def latents(store: LatentStore) -> dict[str, bytes]:
    return {record.key: record.latent.tobytes() for record in store}


def interrupt(store: Path) -> int:
    """Take away what a killed run had not written yet; gives the number of commits left."""
    commits = sorted((store / "commits").iterdir())
    for commit in commits[::2]:
        commit.unlink()
    (store / DATASET_PATH).unlink()
    return len(commits) - len(commits[::2])


def stitch_of(store: Path) -> str:
    stitch: str = json.loads((store / PLAN_PATH).read_text())["fingerprint"]["chunking"]["stitch"]
    return stitch


def test_a_new_store_has_the_latents_of_whole_items(
    tmp_path: Path, sounds: dict[str, np.ndarray]
) -> None:
    store = encoded(options(tmp_path))
    assert store.chunking.stitch == "state" == stitch_of(tmp_path / "store")
    for key, sound in sounds.items():
        assert np.allclose(store[key].latent, expected(sound), rtol=1e-5)
    assert not verify(store).faults
    report = measure_seams(store)
    assert len(report.items) == 4
    assert report.largest < 1e-6
    assert store.origin.of_length(200).shape == (1, 200)
    for key, sound in sounds.items():
        audio = store.decode(key)
        assert audio.shape == (1, len(sound))
        assert np.allclose(audio[0], expected(sound)[0].repeat(HOP)[: len(sound)], rtol=1e-4)


@pytest.mark.parametrize("stitch", [None, "state", "trim"])
def test_an_interrupted_store_is_continued_with_equal_latents(
    tmp_path: Path, sounds: dict[str, np.ndarray], stitch: str | None
) -> None:
    given = options(tmp_path, stitch=stitch)
    store = encoded(given)
    before = latents(store)
    assert before.keys() == sounds.keys()
    assert interrupt(tmp_path / "store") > 1
    assert latents(encoded(given)) == before
    whole = latents(encoded({**given, "out": str(tmp_path / "whole"), "unit_seconds": 100.0}))
    for key, value in whole.items():  # other batches
        assert np.allclose(
            np.frombuffer(value, np.float32), np.frombuffer(before[key], np.float32), rtol=1e-5
        )


def test_a_store_that_was_planned_with_trim_continues_with_trim(
    tmp_path: Path, sounds: dict[str, np.ndarray]
) -> None:
    """As every store of the versions before `state`; the command has no --stitch."""
    trimmed = latents(encoded(options(tmp_path, stitch="trim")))
    interrupt(tmp_path / "store")
    store = encoded(options(tmp_path))
    assert store.chunking.stitch == "trim" == stitch_of(tmp_path / "store")
    assert latents(store) == trimmed
    wrong = [key for key, sound in sounds.items() if len(sound) > CHUNK]
    for key in wrong:  # so that equality with trim means something
        assert not np.allclose(store[key].latent, expected(sounds[key]), rtol=1e-5)
    with pytest.raises(StoreError, match="stitch"):
        run(load_config(None, options(tmp_path, stitch="state")))


def test_a_plan_with_trim_is_followed_from_the_start(
    tmp_path: Path, sounds: dict[str, np.ndarray]
) -> None:
    forecast(load_config(None, options(tmp_path, stitch="trim")), calibrated=False)
    assert encoded(options(tmp_path)).chunking.stitch == "trim"


def test_compile_needs_trim(tmp_path: Path, sounds: dict[str, np.ndarray]) -> None:
    with pytest.raises(ConfigError, match=r"--compile does not work with --stitch state.*trim"):
        run(load_config(None, options(tmp_path, compile=True)))
