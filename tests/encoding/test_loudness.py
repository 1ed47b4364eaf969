"""The level of each frame: that of the audio, however it comes in blocks."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from latentmill.encoding.loudness import SEARCHED, LevelMeter, busiest_part, loudest_part
from latentmill.models.families import mdct
from latentmill.record import decibels

MDCT = mdct.build(hop=16, sample_rate=1600).spec
PLAIN = replace(MDCT, overhang=0)


def measured(audio: np.ndarray, frames: int, cuts: list[int], spec=PLAIN) -> np.ndarray:
    meter = LevelMeter(spec)
    for block in np.split(audio, sorted(cuts), axis=1):
        meter.push(block)
    return decibels(meter.finish(frames))


@given(
    samples=st.integers(1, 300),
    channels=st.integers(1, 2),
    cuts=st.lists(st.integers(0, 300), max_size=5),
)
def test_a_frame_has_the_level_of_its_samples(samples: int, channels: int, cuts: list[int]) -> None:
    audio = np.random.default_rng(samples).uniform(-1, 1, (channels, samples)).astype(np.float32)
    frames = PLAIN.frames(samples)
    levels = measured(audio, frames, cuts)
    assert levels.dtype == np.float32
    assert levels.shape == (frames,)
    for frame, level in enumerate(levels):
        part = audio[:, frame * 16 : (frame + 1) * 16].astype(np.float64)
        assert level == pytest.approx(10 * np.log10(np.mean(part**2)), abs=0.26)
    assert np.array_equal(levels, measured(audio, frames, []))


def test_silence_full_scale_and_beyond() -> None:
    audio = np.zeros((1, 96), np.float32)
    audio[:, 16:32] = 1
    audio[:, 32:48] = 4  # louder than full scale
    audio[:, 48:64] = 1e-6
    audio[:, 64:80] = 1e-9
    assert measured(audio, 8, []).tolist() == [-np.inf, 0, 0, -120, -np.inf, *[-np.inf] * 3]


def test_frames_that_look_back_hear_the_hop_before() -> None:
    audio = np.zeros((1, 64), np.float32)
    audio[:, 16:32] = 0.5
    heard = measured(audio, MDCT.frames(64), [], MDCT)
    assert np.isfinite(heard).tolist() == [False, True, True, False, False]


def test_the_loudest_part() -> None:
    steps = np.random.default_rng(3).integers(0, 256, (2, 500), np.uint8)
    power = np.where(steps > 0, 10 ** ((steps.astype(float) - 255) / 20), 0)
    levels = [row.tobytes() for row in steps]
    for count in (1, 2):
        sums = [power[:count, start : start + 30].sum() for start in range(471)]
        assert loudest_part(levels[:count], 500, 30, 1.0) == np.argmax(sums)
    assert loudest_part(levels, 500, 500, 1.0) == loudest_part(levels, 20, 30, 1.0) == 0
    assert loudest_part([None], 500, 30, 1.0) == 0


def test_the_busiest_part_has_most_stems_not_the_loudest_one() -> None:
    loud, quiet, late = (np.zeros(500, np.uint8) for _ in range(3))
    loud[50:90] = 250
    quiet[300:420], late[310:350] = 170, 180
    levels = [one.tobytes() for one in (loud, quiet, late)]
    assert loudest_part(levels, 500, 40, 1.0) == 50
    assert busiest_part(levels, 500, 40, 1.0) == 310
    assert busiest_part([None, *levels], 300, 40, 1.0) == 50
    assert busiest_part([b"", None], 20, 30, 1.0) == 0


def test_only_the_start_of_a_long_record_is_searched() -> None:
    """Audio is loaded from its start: hours of it would fill the memory."""
    levels = np.full(10 * 3600, 100, np.uint8)
    levels[200:210] = 150
    levels[30_000:30_010] = 250
    assert loudest_part([levels.tobytes()], len(levels), 10, 1.0) == 200
    assert loudest_part([levels.tobytes()], len(levels), 10, 0.1) <= 50  # a frame is 10 s long
    levels[595:605] = 200
    assert loudest_part([levels.tobytes()], len(levels), 10, 1.0) == SEARCHED - 10
