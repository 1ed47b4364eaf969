"""Opus for players, decoded by libsndfile."""

from __future__ import annotations

import io

import numpy as np
import pytest
import soundfile

from latentmill.pictures.opus import opus


def decoded(data: bytes) -> np.ndarray:
    """Audio `[channels, samples]` at 48 kHz."""
    with soundfile.SoundFile(io.BytesIO(data)) as file:
        assert (file.format, file.subtype, file.samplerate) == ("OGG", "OPUS", 48_000)
        return file.read(always_2d=True).T


def noise(channels: int, samples: int, rate: int) -> np.ndarray:
    """Noise below 3 kHz, which is well within what Opus keeps."""
    spectrum = np.fft.rfft(np.random.default_rng(0).standard_normal((channels, samples)))
    spectrum[:, np.fft.rfftfreq(samples, 1 / rate) > 3000] = 0
    audio = np.fft.irfft(spectrum, samples)
    return 0.3 * audio / abs(audio).max()


@pytest.mark.parametrize(("channels", "rate"), [(1, 48_000), (2, 48_000), (2, 44_100), (1, 16_000)])
def test_the_sound_comes_back(channels: int, rate: int) -> None:
    audio = noise(channels, 2 * rate, rate)
    found = decoded(opus(audio, rate, kbps=128))
    assert found.shape[0] == channels
    assert found.shape[1] == pytest.approx(96_000, abs=960)
    times = np.arange(10_000, 86_000) / 48_000
    wanted = np.interp(times, np.arange(2 * rate) / rate, audio[0])
    assert np.corrcoef(found[0, 10_000:86_000], wanted)[0, 1] > 0.95


def test_a_long_sound_needs_no_more_than_its_bit_rate() -> None:
    data = opus(np.tile(noise(1, 48_000, 48_000), 120), 48_000, kbps=32)
    assert len(data) == pytest.approx(120 * 32_000 / 8, rel=0.15)
    assert decoded(data).shape[1] == pytest.approx(120 * 48_000, abs=960)


def test_odd_sounds_are_encoded() -> None:
    assert decoded(opus(noise(6, 9600, 48_000), 48_000)).shape[0] == 1
    assert opus(np.zeros((2, 0)), 44_100)[:4] == b"OggS"
    loud = decoded(opus(np.full((1, 9600), np.inf), 48_000))
    assert np.isfinite(loud).all()
