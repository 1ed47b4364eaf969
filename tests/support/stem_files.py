"""Songs as stems, real files on one time line, and a store of them without Ray."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import soundfile

from latentmill.store.store import LatentStore
from store.store_files import write_store

RATE, HOP = 3200, 32
SONGS = {
    "north": {"drums": 2.0, "bass": 2.0, "keys": 1.2, "mix": 2.0},
    "south": {"drums": 1.5, "bass": 1.5, "keys": 1.5},
    "solo": {"drums": 0.6},
}


def write_stems(folder: Path) -> Path:
    """Noise on the songs' time lines; the bass of `north` is silent for its first second."""
    random = np.random.default_rng(5)
    for song, stems in SONGS.items():
        (folder / song).mkdir(parents=True, exist_ok=True)
        for role, seconds in stems.items():
            audio = random.uniform(-0.3, 0.3, round(seconds * RATE)).astype(np.float32)
            if (song, role) == ("north", "bass"):
                audio[:RATE] = 0
            soundfile.write(folder / song / f"{role}.wav", audio, RATE, subtype="FLOAT")
            sidecar = {"group": song, "role": role, "prompt": f"{role} of {song}"}
            (folder / song / f"{role}.json").write_text(json.dumps(sidecar))
    return folder


def write_segments(manifest: Path, source: Path, seconds: float) -> Path:
    """A manifest of segments of the songs; those of the bass begin 20 us late, as if rounded."""
    rows = []
    for song, stems in SONGS.items():
        for role, length in stems.items():
            late = 2e-5 if role == "bass" else 0.0
            for number in range(math.ceil(round(length / seconds, 6))):
                start = number * seconds + late
                row = {"audio_filepath": str(source / song / f"{role}.wav"), "offset": start}
                row["duration"] = min(seconds, length - start)
                rows.append(row | {"group": song, "role": role})
    manifest.write_text("\n".join(map(json.dumps, rows)))
    return manifest


def write_stem_store(url: Path, source: Path, **options: object) -> LatentStore:
    """A float32 `mdct` store of them: exactly linear, so that nothing is lost but rounding."""
    settings = {
        "model_options": {"hop": HOP, "sample_rate": RATE},
        "dtype": "float32",
        "chunk_seconds": 0.5,
        **options,
    }
    return write_store(str(url), source, **settings)


def waveform(source: Path, key: str, samples: int) -> np.ndarray:
    """A stem's audio `[1, samples]`, cut or continued by zeros."""
    audio, _ = soundfile.read(source / f"{key}.wav", dtype="float32")
    audio = audio[:samples]
    return np.pad(audio, (0, samples - len(audio)))[None]
