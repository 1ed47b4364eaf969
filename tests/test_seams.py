"""The error at the seams: none for mdct, some for a model that normalises over the chunk."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile

import latentmill as lm
from latentmill.errors import ConfigError
from latentmill.seams import measure_seams
from latentmill.store.verify import verify
from support.linear_cae_weights import use_cache, write_cache

RATE = 44100


@pytest.fixture(scope="module")
def noise(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One item shorter than a chunk of 2 s, three longer ones."""
    folder = tmp_path_factory.mktemp("noise")
    random = np.random.default_rng(1)
    for index, seconds in enumerate((1.0, 4.0, 5.1, 6.3)):
        samples = random.standard_normal(round(seconds * RATE)) * 0.1
        soundfile.write(folder / f"{index}.wav", samples, RATE, "FLOAT")
    return folder


@pytest.fixture
def encode(noise: Path, tmp_path: Path, ray_session: Path):
    def run(**options: object) -> lm.LatentStore:
        settings = {"dtype": "float32", "chunk_seconds": 2.0, "threads": 1, **options}
        lm.encode(str(noise), str(tmp_path / "out"), **settings)
        return lm.open(str(tmp_path / "out"))

    return run


def test_trimmed_mdct_has_no_seams(encode) -> None:
    report = measure_seams(encode(), items=2)
    assert len(report.items) == 2
    assert report.largest < 1e-6
    assert max(one.worst for one in report.items) < 1e-5


def test_a_model_that_normalises_over_the_chunk_has(
    encode, ray_session: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_cache(ray_session)
    use_cache(monkeypatch, ray_session)
    report = measure_seams(encode(model="lin-cae"), items=3)
    assert [one.key for one in report.items] == ["1", "2", "3"]
    assert 1e-4 < report.median <= report.largest < 1


def test_the_result_stands_in_dataset_json(encode, tmp_path: Path) -> None:
    report = measure_seams(encode())
    written = json.loads((tmp_path / "out" / "dataset.json").read_text())
    assert written["seams"] == {"items": 3, "median": report.median, "largest": report.largest}
    assert verify(lm.open(str(tmp_path / "out"))).faults == []


def test_what_cannot_be_measured_is_said(encode, one_sentence) -> None:
    store = encode()
    with pytest.raises(ConfigError) as caught:
        measure_seams(store, max_seconds=3.0)
    assert "no items between one chunk" in one_sentence(caught.value)


def test_chunks_that_are_kept_apart_have_no_seams(encode) -> None:
    with pytest.raises(ConfigError, match="stitch none"):
        measure_seams(encode(stitch="none"))


def test_the_command_prints_it(encode) -> None:
    store = encode()
    command = [sys.executable, "-m", "latentmill.cli", "seams", store.url]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "stitched against whole: median" in done.stdout
    shown = subprocess.run(
        [sys.executable, "-m", "latentmill.cli", "models", "mdct", "--json"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(shown.stdout)["context"] == 1
