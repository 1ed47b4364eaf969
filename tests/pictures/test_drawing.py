"""Pictures, decoded by Pillow: their size, and what is drawn where."""

from __future__ import annotations

import io

import numpy as np
import pytest

from latentmill.pictures.colours import DIVERGING, SEQUENTIAL
from latentmill.pictures.drawing import Picture, heat_map, spectrogram, waveform

Image = pytest.importorskip("PIL.Image")

RATE = 44100


def pixels(picture: Picture) -> np.ndarray:
    """The numbers of the colours, as Pillow decodes them."""
    image = Image.open(io.BytesIO(picture.data))
    image.verify()
    image = Image.open(io.BytesIO(picture.data))
    assert image.size == (picture.width, picture.height)
    return np.asarray(image)


def tone(frequency: float, decibels: float, seconds: float = 2.0) -> np.ndarray:
    time = np.arange(int(seconds * RATE)) / RATE
    return 10 ** (decibels / 20) * np.sin(2 * np.pi * frequency * time)[None]


def test_a_waveform_is_high_where_the_sound_is_loud() -> None:
    audio = np.concatenate([0.1 * tone(440, 0), tone(440, 0)], axis=1)
    drawn = (pixels(waveform(audio, width=200, height=100)) > 0).sum(axis=0)
    assert np.allclose(drawn[5:95], 10, atol=2)
    assert np.allclose(drawn[105:195], 100, atol=2)
    # RMS of a sine: 1 / sqrt(2) of its peak.
    body = (pixels(waveform(audio, width=200, height=100)) == 2).sum(axis=0)
    assert np.allclose(body[105:195], 100 / 2**0.5, atol=2)


def test_the_ground_of_a_waveform_is_transparent() -> None:
    image = Image.open(io.BytesIO(waveform(tone(440, -6), peak=1.0).data)).convert("RGBA")
    alpha = np.asarray(image)[..., 3]
    assert not alpha[0].any()
    assert alpha[alpha.shape[0] // 2].all()


@pytest.mark.parametrize(("frequency", "decibels"), [(100, -20), (1000, -20), (8000, -50)])
def test_a_sine_is_one_line_of_its_frequency_and_level(frequency: float, decibels: float) -> None:
    height = 128
    drawn = pixels(spectrogram(tone(frequency, decibels), RATE, height=height))[:, 300]
    row = height * (1 - np.log(frequency / 40) / np.log(RATE / 2 / 40))
    assert abs(int(drawn.argmax()) + 0.5 - row) <= 2.5
    # The window reads up to 1.4 dB less between two bins.
    assert drawn.max() == pytest.approx(255 * (decibels + 90) / 80, abs=255 * 1.5 / 80)
    assert np.median(drawn) < 30


def test_a_click_is_drawn_when_it_is_heard() -> None:
    audio = np.zeros((2, 10 * RATE), np.float32)
    audio[1, 7 * RATE] = 1.0
    brightest = pixels(spectrogram(audio, RATE, width=500)).max(axis=0)
    assert brightest[:330].max() == 0
    assert 345 <= int(brightest.argmax()) <= 355


def test_a_small_latent_is_drawn_value_by_value() -> None:
    latent = np.linspace(-3, 3, 32).reshape(4, 8).astype(np.float16)
    ones = np.ones(4)
    picture = heat_map(latent, width=80, height=40, mean=0 * ones, deviation=ones)
    expected = np.rint(127.5 + 127.5 * latent.astype(np.float64) / 3)
    assert (abs(pixels(picture)[5::10, 5::10] - expected) <= 1).all()
    assert "-3 (blue)" in picture.scale


def test_many_values_in_a_pixel_show_the_farthest_from_zero() -> None:
    latent = np.full((512, 10_000), 0.01, np.float32)
    latent[300, 4000], latent[100, 9000] = -5, 5
    drawn = pixels(
        heat_map(latent, width=500, height=128, mean=np.zeros(512), deviation=np.ones(512))
    )
    assert drawn[300 // 4, 4000 // 20] == 0
    assert drawn[100 // 4, 9000 // 20] == 255
    assert ((drawn == 0) | (drawn == 255)).sum() == 2


def test_the_mean_of_a_channel_is_dark() -> None:
    latent = np.stack([np.full(10, 7.0), np.full(10, -2.0)])
    drawn = pixels(heat_map(latent, mean=np.array([7.0, -2.0]), deviation=np.array([1.0, 0.0])))
    assert set(np.unique(drawn)) <= {127, 128}


def luminance(palette: np.ndarray) -> np.ndarray:
    """Relative luminance, from the WCAG."""
    values = palette[:, :3] / 255
    linear = np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)
    return linear @ (0.2126, 0.7152, 0.0722)


def test_colours_become_steadily_lighter() -> None:
    lightness = np.cbrt(luminance(SEQUENTIAL))  # as in CIELAB, up to a factor
    assert (np.diff(lightness) > -0.004).all()
    assert lightness[-1] > 3 * lightness[0]
    halves = luminance(DIVERGING)
    assert np.allclose(np.cbrt(halves[:128]), np.cbrt(halves[:127:-1]), atol=0.06)
    assert halves[127] == pytest.approx(halves.min(), rel=0.01)


@pytest.mark.parametrize("samples", [0, 1, 100])
def test_hardly_any_sound_is_drawn_too(samples: int) -> None:
    audio = np.full((2, samples), np.nan)
    for picture in (waveform(audio), spectrogram(audio, 48000)):
        assert pixels(picture).size
    for latent in (np.zeros((8, min(samples, 3))), np.zeros((2, 8, 1 + samples))):
        assert pixels(heat_map(latent)).size
