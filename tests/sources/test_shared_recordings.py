"""Segments of remote recordings: each recording is fetched once and kept until its last segment."""

from __future__ import annotations

import contextlib
import io
import random
import uuid
from collections import Counter
from typing import Any

import numpy as np
import pytest
import soundfile

from latentmill.audio.media import MediaFile
from latentmill.encoding.chunks import Chunking
from latentmill.encoding.encoder import UnitEncoder
from latentmill.encoding.lanes import LANES
from latentmill.encoding.loading import EncodeSettings, Loading
from latentmill.encoding.unit_audio import LocalAudio
from latentmill.models.families import mdct
from latentmill.sources import reading
from latentmill.sources.base import Item, Segment
from latentmill.sources.reading import UnitReader
from support.sources import put

RATE = 8000
MODEL = mdct.build(hop=64, sample_rate=RATE).load("cpu")


@pytest.fixture
def fetches(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each recording was fetched."""
    found: Counter[str] = Counter()
    real = reading.open_media

    def counted(uri: str, *args: Any) -> MediaFile:
        found[uri] += 1
        return real(uri, *args)

    monkeypatch.setattr(reading, "open_media", counted)
    return found


def segments(recordings: int, each: int, longest: float = 30.0) -> list[Item]:
    """Segments of 1 s to `longest` seconds."""
    numbers, folder, items = random.Random(0), f"memory://{uuid.uuid4().hex}", []
    for recording in range(recordings):
        start = 0.0
        for segment in range(each):
            length = round(numbers.uniform(1.0, longest), 2)
            part = Segment(start, length)
            uri = f"{folder}/{recording}.wav"
            items.append(Item(f"{recording}/{segment}", uri, 0, "", segment=part))
            start += length
        noise = np.random.default_rng(recording).uniform(-0.3, 0.3, round((start + 1) * RATE))
        target = io.BytesIO()
        soundfile.write(target, noise, RATE, format="WAV", subtype="PCM_16")
        put(uri, target.getvalue())
    return items


def test_each_recording_is_fetched_once_though_lanes_advance_at_different_speeds(
    fetches: Counter[str],
) -> None:
    items = segments(30, 20)
    chunking = Chunking.for_model(MODEL.spec, seconds=10.0)
    settings = EncodeSettings(batch_size=16, load_threads=2)
    encoder = UnitEncoder(MODEL, chunking, settings)
    audio = LocalAudio(items, Loading(MODEL.spec, chunking, settings), encoder.timings)
    with contextlib.closing(audio):
        assert {one.status for one in encoder.encode(audio)} == {"encoded"}
        assert not audio._reader._recordings
    assert fetches == Counter({item.uri for item in items})


def test_no_more_recordings_are_kept_than_a_unit_has_lanes(fetches: Counter[str]) -> None:
    first, second = (segments(LANES + 1, 2, longest=1.0)[n::2] for n in (0, 1))
    last = [Item(f"{one.key} again", one.uri, 0, "", segment=one.segment) for one in first]
    with UnitReader([*first, *last]) as reader:
        for item in first:
            reader.open(item).close()
            reader.release(item)
        assert len(reader._recordings) == LANES
        for item in last[:0:-1]:  # all but the one that was closed
            reader.open(item).close()
        assert set(fetches.values()) == {1}
        reader.open(last[0]).close()
        assert fetches[last[0].uri] == 2
        for item in [*second, *last]:  # also items that the reader was not given
            reader.release(item)
        assert not reader._recordings
