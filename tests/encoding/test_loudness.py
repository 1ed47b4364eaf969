"""The level of each frame: that of the audio, however it comes in blocks."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from latentmill.encoding.loudness import LevelMeter, decibels
from latentmill.models.families import mdct

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
