"""A small corpus of real files in many formats, rates and lengths."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import soundfile as sf


def noise(seconds: float, rate: int, channels: int = 1, seed: int = 0) -> np.ndarray:
    """Noise with a beat, `[n, channels]`, float32, peak below 1."""
    count = round(seconds * rate)
    signal = np.random.default_rng(seed).uniform(-0.8, 0.8, (count, channels))
    beat = 0.6 + 0.4 * np.sin(2 * np.pi * 2 * np.arange(count) / rate)
    return (signal * beat[:, None]).astype(np.float32)


CORPUS = {  # path: (seconds, rate, channels, soundfile's subtype)
    "album/long.wav": (3.7, 8000, 1, "PCM_16"),
    "album/stereo.flac": (2.3, 44100, 2, "PCM_16"),
    "album/disc 1/vorbis.ogg": (1.9, 22050, 1, "VORBIS"),
    "boundary.wav": (1.0, 8000, 1, "FLOAT"),
    "lame.mp3": (2.6, 44100, 2, "MPEG_LAYER_III"),
    "short.flac": (0.21, 8000, 2, "PCM_24"),
    "tiny.wav": (0.004, 8000, 1, "PCM_16"),
    "über.aiff": (1.31, 16000, 1, "PCM_16"),
}


def write_corpus(root: Path) -> Path:
    """Write CORPUS below `root`, two sidecars and a picture."""
    for seed, (name, (seconds, rate, channels, subtype)) in enumerate(CORPUS.items()):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        sf.write(path, noise(seconds, rate, channels, seed), rate, subtype=subtype)
    (root / "album/long.json").write_text(json.dumps({"title": "Länge", "bpm": 120}))
    (root / "album/long.txt").write_text("a long piece\n", encoding="utf-8")
    (root / "album/cover.jpg").write_bytes(b"\xff\xd8")
    return root
