"""The demo, whole: what it says is what the files hold."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile

from latentmill.cli.demo import run_demo
from latentmill.errors import SourceError
from latentmill.store.store import open_store
from support import runs

pytestmark = pytest.mark.usefixtures("inline")


def demo(folder: Path, source: Path | None) -> list[str]:
    said: list[str] = []
    run_demo(folder, None if source is None else str(source), said.append)
    return said


def test_the_demo_encodes_mixes_and_decodes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", [".venv/bin/latentmill", "demo"])  # as `make demo` calls it
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    said = demo(tmp_path, None)
    assert said[0].startswith("corpus: ")
    assert "encoded" in said[1]
    runs.assert_whole(tmp_path / "latents")
    snr = re.search(r"decoded to .*mix.wav: (\d+\.\d) dB SNR against", said[2])
    assert snr is not None
    assert float(snr[1]) > 40
    mixed, rate = soundfile.read(tmp_path / "mix.wav", always_2d=True)
    store = open_store(str(tmp_path / "latents"))
    assert rate == store.info.model["sample_rate"]
    assert np.sqrt(np.mean(mixed**2)) > 0.01
    assert said[3].startswith("next: .venv/bin/latentmill info ")

    before = runs.commits(tmp_path / "latents")
    again = demo(tmp_path, None)
    assert "nothing to encode" in again[1]
    assert again[2] == said[2]
    assert runs.commits(tmp_path / "latents") == before


def test_the_demo_takes_ones_own_folder(tmp_path: Path) -> None:
    songs = runs.write_songs(tmp_path / "my songs", 2)
    said = demo(tmp_path / "demo", songs)
    first, second = (soundfile.read(path)[0] for path in sorted(songs.rglob("*.wav")))
    mixed, _ = soundfile.read(tmp_path / "demo" / "mix.wav")
    assert "album 0/song 00 + album 1/song 01" in said[1]
    shorter = min(len(first), len(second))
    np.testing.assert_allclose(mixed, first[:shorter] + second[:shorter], atol=5e-3)


def test_a_folder_with_one_song_is_encoded_and_said_to_be_too_little(tmp_path: Path) -> None:
    said = demo(tmp_path / "demo", runs.write_songs(tmp_path / "songs", 1))
    assert "1 encoded" in said[0]
    assert (
        said[-1]
        == "nothing to mix: fewer than two records were encoded; try a folder with more audio"
    )


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="does not exist"):
        demo(tmp_path / "demo", tmp_path / "nowhere")
