"""Units of real files, encoded in this process by a small MDCT."""

from __future__ import annotations

import contextlib
import struct
import threading
from collections.abc import Sequence
from pathlib import Path

from latentmill.encoding.chunks import Chunking
from latentmill.encoding.encoder import UnitEncoder
from latentmill.encoding.loading import EncodeSettings, Loading
from latentmill.encoding.timings import Timings
from latentmill.encoding.unit_audio import LocalAudio
from latentmill.models.base import Autoencoder
from latentmill.models.families import mdct
from latentmill.record import Outcome, Record
from latentmill.sources.base import Item
from latentmill.sources.folder import FolderSource

RATE = 8000
MODEL = mdct.build(hop=64, sample_rate=RATE).load("cpu")
CHUNKING = Chunking.for_model(MODEL.spec, seconds=0.5)
EXTENSIONS = ("wav", "flac", "ogg", "mp3", "aiff")


def items_of(folder: Path) -> tuple[Item, ...]:
    return tuple(sorted(FolderSource(str(folder), EXTENSIONS).items(), key=lambda i: i.key))


def encode(
    items: Sequence[Item],
    model: Autoencoder = MODEL,
    chunking: Chunking = CHUNKING,
    settings: EncodeSettings = EncodeSettings(dtype="float32", batch_size=4),  # noqa: B008
    timings: Timings | None = None,
) -> list[Outcome]:
    """Every item's outcome; always in the items' order, each once."""
    encoder = UnitEncoder(model, chunking, settings, timings)
    audio = LocalAudio(items, Loading(model.spec, chunking, settings), encoder.timings)
    with contextlib.closing(audio):
        outcomes = list(encoder.encode(audio))
    assert [outcome.key for outcome in outcomes] == [item.key for item in items]
    for outcome in outcomes:
        assert (outcome.record is not None) == (outcome.status == "encoded")
        assert (outcome.reason is None) == (outcome.status == "encoded")
        assert outcome.reason is None or ("\n" not in outcome.reason and outcome.reason)
    assert not load_threads()
    return outcomes


def load_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("load")]


def records(outcomes: Sequence[Outcome]) -> dict[str, Record]:
    return {outcome.key: outcome.record for outcome in outcomes if outcome.record is not None}


def statuses(outcomes: Sequence[Outcome]) -> dict[str, str]:
    return {outcome.key: outcome.status for outcome in outcomes}


def without_length(flac: bytes) -> bytes:
    """A FLAC that does not say how long it is, as a live encoder writes it."""
    return flac[:21] + bytes([flac[21] & 0xF0, 0, 0, 0, 0]) + flac[26:]


def sparse_wav(path: Path, samples: int) -> Path:
    """A 16-bit mono WAV of silence that takes no room on the disk."""
    size = 2 * samples
    fields = (b"RIFF", 36 + size, b"WAVE", b"fmt ", 16, 1, 1, RATE, 2 * RATE, 2, 16, b"data", size)
    with path.open("wb") as file:
        file.write(struct.pack("<4sI4s4sIHHIIHH4sI", *fields))
        file.truncate(44 + size)
    return path
