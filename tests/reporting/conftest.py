"""A store with everything that a report shows: stems, failures, hostile names, silence, results."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile

import latentmill as lm
from latentmill.evaluation.evaluate import evaluate
from latentmill.store.store import LatentStore
from store.store_files import write_store

RATE, HOP = 22050, 64
SETTINGS = {
    "model_options": {"hop": HOP, "sample_rate": RATE},
    "dtype": "float32",
    "min_seconds": 0.1,
    "chunk_seconds": 2.0,
}
HOSTILE_KEY = "<img src=x onerror=alert(1)>/\"&'<script>alert(2)<"
HOSTILE_METADATA = {"note": "</table></script><script>alert(3)</script>", "<b>": "\u202etxt"}
ENCODED = 11


def tone(frequency: float, seconds: float, level: float = 0.3) -> np.ndarray:
    time = np.arange(round(seconds * RATE)) / RATE
    noise = np.random.default_rng(int(frequency)).standard_normal(len(time))
    return level * (0.7 * np.sin(2 * np.pi * frequency * time) + 0.1 * noise)


def write_source(folder: Path) -> Path:
    for loud, song in enumerate(("north", "south")):
        for number, role in enumerate(("drums", "bass", "keys")):
            path = folder / song / f"{role}.wav"
            path.parent.mkdir(parents=True, exist_ok=True)
            audio = tone(200 * (number + 1) + loud, 4.0, 0.1 + 0.05 * number + 0.02 * loud)
            soundfile.write(path, audio, RATE, subtype="FLOAT")
            sidecar = {"group": song, "role": role, "bpm": 90 + number}
            path.with_suffix(".json").write_text(json.dumps(sidecar))
    late = np.concatenate([tone(700, 12.0, 0.01), tone(700, 8.0, 0.5)])
    soundfile.write(folder / "late.wav", late, RATE, subtype="FLOAT")
    soundfile.write(folder / "same 1.wav", tone(900, 1.5), RATE, subtype="FLOAT")
    shutil.copy(folder / "same 1.wav", folder / "same 2.wav")  # soundfile writes the time into it
    soundfile.write(folder / "silent.wav", np.zeros(RATE), RATE, subtype="FLOAT")
    hostile = folder / f"{HOSTILE_KEY}.wav"
    hostile.parent.mkdir()
    soundfile.write(hostile, tone(1200, 0.5), RATE, subtype="FLOAT")
    hostile.with_suffix(".json").write_text(json.dumps(HOSTILE_METADATA))
    soundfile.write(folder / "short.wav", np.zeros(100), RATE, subtype="FLOAT")
    for number in range(2):
        (folder / f"broken {number}.wav").write_text("this is no audio")
    (folder / "cover.jpg").write_bytes(b"\xff\xd8")
    return folder


@pytest.fixture(scope="session")
def report_source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_source(tmp_path_factory.mktemp("report") / "source")


@pytest.fixture(scope="session")
def report_store(report_source: Path) -> LatentStore:
    """The store with all results of an evaluation. Leave it unchanged."""
    store = write_store(str(report_source.parent / "store"), report_source, **SETTINGS)
    evaluate(store, items=2, max_seconds=2.0)
    return store


@pytest.fixture(scope="session")
def report_file(report_store: LatentStore, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of that store. Leave it unchanged."""
    path = tmp_path_factory.mktemp("page") / "report.html"
    lm.report(report_store, path)
    return path
