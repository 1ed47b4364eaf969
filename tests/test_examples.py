"""The training example, a short run of it: the loss goes down."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile

from store.store_files import write_store

EXAMPLE = Path(__file__).parents[1] / "examples" / "train_dit.py"


@pytest.mark.slow
def test_the_loss_goes_down(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    (tmp_path / "audio").mkdir()
    for number in range(6):  # chords, which the model can learn
        time = np.arange(8000 * 4) / 8000
        tones = sum(np.sin(2 * np.pi * f * time) for f in random.integers(100, 900, 3))
        soundfile.write(tmp_path / "audio" / f"{number}.wav", 0.1 * tones, 8000)
    model = {"hop": 32, "sample_rate": 8000}
    store = write_store(str(tmp_path / "latents"), tmp_path / "audio", model_options=model)
    options = ["--store", store.url, "--folder", tmp_path / "dit", "--steps", 40, "--crop", 16]
    done = subprocess.run(
        [sys.executable, EXAMPLE, "--batch", "4", *map(str, options)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "waiting for the reader" in done.stdout
    result = json.loads((tmp_path / "dit" / "result.json").read_text())
    assert result["loss_after"] < 0.9 * result["loss_before"]
    assert len(result["losses"]) == result["steps"] == 40
    assert 0 < result["reader_wait_share"] < 0.5  # examples/train_dit.json says what it is
