"""Colour tables of the pictures, perceptually uniform by construction.

The colours are computed in OKLCH, in which equal steps of lightness look equal (Ottosson 2020,
https://bottosson.github.io/posts/oklab). Both tables start or centre at the dark colour of the
panel, so that a picture looks the same on a light and on a dark page.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Palette = npt.NDArray[np.uint8]  # [256, 3], or [256, 4] with alpha
Levels = npt.NDArray[np.float64]

_TO_LMS = np.array(
    [
        [1, 0.3963377774, 0.2158037573],
        [1, -0.1055613458, -0.0638541728],
        [1, -0.0894841775, -1.291485548],
    ]
)
_TO_RGB = np.array(
    [
        [4.0767416621, -3.3077115913, 0.2309699292],
        [-1.2684380046, 2.6097574011, -0.3413193965],
        [-0.0041960863, -0.7034186147, 1.707614701],
    ]
)
DARKEST, BRIGHTEST = 0.19, 0.93  # lightness


def rgb(lightness: Levels, chroma: Levels, hue: Levels) -> Palette:
    """Convert OKLCH colours (hue in degrees) to sRGB bytes `[n, 3]`."""
    angle = np.deg2rad(hue)
    lab = np.stack([lightness, chroma * np.cos(angle), chroma * np.sin(angle)], axis=1)
    linear = np.clip((lab @ _TO_LMS.T) ** 3 @ _TO_RGB.T, 0, 1)
    encoded = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    colours: Palette = np.rint(255 * encoded).astype(np.uint8)
    return colours


def _sequential() -> Palette:
    """Dark blue over magenta and orange to a bright yellow."""
    step = np.linspace(0, 1, 256)
    chroma = 0.02 + 0.15 * np.sin(np.pi * step) ** 0.8
    return rgb(DARKEST + (BRIGHTEST - DARKEST) * step, chroma, 275 + 185 * step)


def _diverging() -> Palette:
    """Bright blue for negative values, dark for 0, bright orange for positive values."""
    step = np.linspace(-1, 1, 256)
    size = abs(step)
    chroma = 0.005 + 0.14 * np.sin(np.pi * size / 1.5)
    return rgb(DARKEST + 0.66 * size, chroma, np.where(step < 0, 245.0, 60.0))


SEQUENTIAL, DIVERGING = _sequential(), _diverging()
