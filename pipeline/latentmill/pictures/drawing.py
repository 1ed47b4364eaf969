"""Waveforms, spectrograms and latents as PNG pictures of a fixed size."""

from __future__ import annotations

import base64
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from latentmill.pictures.colours import DIVERGING, SEQUENTIAL, rgb
from latentmill.pictures.png import png
from latentmill.text.printing import number_text

Array = npt.NDArray[Any]

WIDTH = 640
QUIETEST, LOUDEST = -90.0, -10.0  # dBFS at the ends of a spectrogram's colours
LOWEST = 40.0  # Hz
WINDOW = 4096  # samples of a spectrum, at 44.1 kHz
_PARTS = 4  # spectra per pixel column at most
_WAVE = np.zeros((3, 4), np.uint8)  # transparent, the range of the samples, their RMS
_WAVE[1:, :3] = rgb(np.array([0.63, 0.63]), np.array([0.12, 0.12]), np.array([235.0, 235.0]))
_WAVE[1:, 3] = 120, 255


@dataclass(frozen=True)
class Picture:
    """A PNG picture.

    Attributes:
        data: The bytes of the file.
        width: Pixels.
        height: Pixels.
        scale: What its axes and colours mean, as a short phrase.
    """

    data: bytes
    width: int
    height: int
    scale: str

    @property
    def uri(self) -> str:
        """The picture as a data URI."""
        return f"data:image/png;base64,{base64.b64encode(self.data).decode()}"


def waveform(
    audio: Array, *, width: int = WIDTH, height: int = 96, peak: float | None = None
) -> Picture:
    """Draw audio `[channels, samples]`: per column the range of the samples, and their RMS.

    `peak` is the value at the top of the picture; the default is the largest sample. The colours
    are of medium lightness on a transparent ground, and can be seen on light and on dark pages.
    """
    samples = np.nan_to_num(np.atleast_2d(audio).astype(np.float32))
    starts = _starts(samples.shape[1], width)
    top = float(abs(samples).max(initial=0.0)) if peak is None else peak
    pixels = np.zeros((height, width), np.uint8)
    if samples.size and top > 0:
        low = np.minimum.reduceat(samples.min(axis=0), starts)
        high = np.maximum.reduceat(samples.max(axis=0), starts)
        counts = np.maximum(1, np.diff(np.append(starts, samples.shape[1])))
        rms = np.sqrt(np.add.reduceat(np.square(samples).mean(axis=0), starts) / counts)
        rows = np.linspace(1, -1, height)[:, None] * top
        half = top / height
        pixels[(rows >= low - half) & (rows <= high + half)] = 1
        pixels[(abs(rows) <= rms) & (pixels == 1)] = 2
    pixels[height // 2][pixels[height // 2] == 0] = 1
    return Picture(png(pixels, _WAVE), width, height, f"full height: ±{top:.3g}")


def spectrogram(audio: Array, rate: int, *, width: int = WIDTH, height: int = 128) -> Picture:
    """Draw the level of audio `[channels, samples]` by time and logarithmic frequency."""
    samples = np.nan_to_num(np.atleast_2d(audio).astype(np.float32))
    window = 1 << round(np.log2(WINDOW * rate / 44100))
    edges = np.geomspace(LOWEST, rate / 2, height + 1) * window / rate  # in bins
    levels = _levels(samples, window, width)
    centres = np.clip((edges[1:] + edges[:-1]) / 2, 0, len(levels) - 1)
    below = np.minimum(centres.astype(int), len(levels) - 2)
    part = (centres - below)[:, None]
    rows = levels[below] * (1 - part) + levels[below + 1] * part
    first = np.minimum(np.ceil(edges[:-1]).astype(int), len(levels) - 1)
    wide = np.diff(edges) >= 2  # rows that cover several bins show the loudest
    rows[wide] = np.maximum.reduceat(levels, first, axis=0)[wide]
    shade = np.clip((rows - QUIETEST) / (LOUDEST - QUIETEST), 0, 1)
    pixels = np.rint(255 * shade[::-1]).astype(np.uint8)
    scale = (
        f"{LOWEST:g} Hz to {rate / 2000:.3g} kHz, logarithmic; {QUIETEST:g} dBFS (dark) to "
        f"{LOUDEST:g} dBFS (bright)"
    )
    return Picture(png(pixels, SEQUENTIAL), width, height, scale)


def heat_map(
    latent: Array,
    *,
    width: int = WIDTH,
    height: int = 128,
    mean: Array | None = None,
    deviation: Array | None = None,
) -> Picture:
    """Draw a latent `[channels, frames]`, the first channel on top.

    With the mean and deviation of each channel over the store, values are shown in deviations from
    -3 to 3; otherwise as they are, up to the 99th percentile. A pixel that covers several values
    shows the one that is farthest from zero.
    """
    values = np.nan_to_num(np.asarray(latent, np.float32))
    if values.ndim == 3:  # overlapping chunks, one after the other
        values = np.concatenate(list(values), axis=1)
    if mean is not None and deviation is not None:
        values = (values - mean[:, None]) / np.where(deviation > 0, deviation, 1)[:, None]
        limit, unit = 3.0, " deviations of the channel"
    else:
        limit, unit = float(np.quantile(abs(values), 0.99)) if values.size else 0.0, ""
    values = _farthest(_farthest(values, height).T, width).T
    shade = np.clip(values / (limit or 1.0), -1, 1)
    pixels = np.rint(127.5 + 127.5 * shade).astype(np.uint8)
    most = number_text(limit)
    scale = f"channels from top to bottom; -{most} (blue) over 0 (dark) to {most}{unit} (orange)"
    return Picture(png(pixels, DIVERGING), width, height, scale)


def _starts(count: int, parts: int) -> npt.NDArray[np.int64]:
    """The first index of each of `parts` equal parts; an index may repeat."""
    return np.arange(parts, dtype=np.int64) * count // parts


def _farthest(values: Array, rows: int) -> Array:
    """Change the number of rows; several rows become one with the values farthest from zero."""
    if not values.size:
        return np.zeros((rows, values.shape[1]), np.float32)
    starts = _starts(len(values), rows)
    high, low = (one.reduceat(values, starts, axis=0) for one in (np.maximum, np.minimum))
    return np.where(high >= -low, high, low)


def _levels(samples: Array, window: int, width: int) -> Array:
    """Levels in dB of a full-scale sine `[bins, width]`, the mean power of the channels."""
    shape = np.hanning(window + 1)[:-1].astype(np.float32)
    count = samples.shape[1]
    padded = np.pad(samples, ((0, 0), (window // 2, window // 2 + 1)))
    parts = int(np.clip(np.ceil(count / width / window), 1, _PARTS))
    centres = (np.arange(width * parts) + 0.5) * count / (width * parts)
    starts = np.minimum(centres.astype(int), count)
    power = np.zeros((width, window // 2 + 1), np.float32)
    for first in range(0, width, 64):  # some columns at once, to limit the memory
        chosen = starts[first * parts : (first + 64) * parts]
        frames = padded[:, chosen[:, None] + np.arange(window)] * shape
        spectra = np.square(abs(np.fft.rfft(frames)) * 2 / shape.sum()).mean(axis=0)
        power[first : first + 64] = spectra.reshape(-1, parts, window // 2 + 1).max(axis=1)
    levels: Array = 10 * np.log10(power.T + 1e-20)
    return levels
