"""A small corpus, and runs that train a tiny `conv` on it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile

from latentmill.training.settings import TrainSettings, load_settings, parse_options

RATE = 8000


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Chords of different lengths; one is shorter than a crop. Leave it unchanged."""
    folder = tmp_path_factory.mktemp("corpus")
    random = np.random.default_rng(0)
    for number, seconds in enumerate((2.0, 1.3, 0.7, 0.02)):
        time = np.arange(round(seconds * RATE)) / RATE
        tones = sum(np.sin(2 * np.pi * f * time) for f in random.integers(100, 900, 3))
        soundfile.write(folder / f"{number}.wav", 0.1 * tones, RATE)
    return folder


Settings = Callable[..., TrainSettings]


@pytest.fixture
def tiny(tmp_path: Path, corpus: Path) -> Settings:
    """Settings of a run in `tmp_path/run`; NAME=VALUE changes one."""

    def make(*changes: str, source: Path = corpus) -> TrainSettings:
        shape = "{sample_rate: 8000, strides: [8, 4], width: 8, latent_channels: 8}"
        given = [f"source={source}", f"out={tmp_path / 'run'}", f"network={shape}", "steps=12"]
        given += ["batch_size=3", "crop_seconds=0.1", "learning_rate=0.01", "log_every=1"]
        given += ["checkpoint_every=4"]
        return load_settings(None, parse_options([*given, *changes]))

    return make
