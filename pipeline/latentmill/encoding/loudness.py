"""Loudness of an item in each latent frame: one byte per frame, measured while it is encoded.

It shows when a stem plays without decoding its latents. A byte v stands for (v - 255) / 2 dB of RMS
over all channels, full scale being 0 dB; 0 is -127.5 dB or less, silence.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from latentmill.models.base import ModelSpec
from latentmill.record import FloatArray

STEPS_PER_DB = 2
LOUDEST = 255  # 0 dB


class LevelMeter:
    """Measures one item's audio, block by block.

    The level of frame n is that of its own samples, n * hop to (n + 1) * hop. If frames start
    earlier than that (`overhang` is negative, as with `mdct`), the level includes the hop before.
    """

    def __init__(self, spec: ModelSpec) -> None:
        self._hop = spec.hop
        self._looks_back = spec.overhang < 0
        self._power: list[npt.NDArray[np.float64]] = []  # of whole hops: the mean square
        self._rest: npt.NDArray[np.float64] = np.zeros(0)  # squares of the hop that is not full

    def push(self, block: FloatArray) -> None:
        """Add the next samples `[C, n]`."""
        squares = np.square(block, dtype=np.float64).mean(axis=0)
        squares = np.concatenate([self._rest, squares])
        whole = len(squares) // self._hop * self._hop
        self._power.append(squares[:whole].reshape(-1, self._hop).mean(axis=1))
        self._rest = squares[whole:].copy()

    def finish(self, frames: int) -> bytes:
        """Return the levels of the first `frames` latent frames, one byte each."""
        last = [self._rest.mean()] if len(self._rest) else []
        power = np.concatenate([*self._power, last])
        if self._looks_back:
            power = (np.append(power, 0) + np.insert(power, 0, 0)) / 2
        power = np.pad(power, (0, max(0, frames - len(power))))[:frames]
        with np.errstate(divide="ignore"):
            decibels = 10 * np.log10(power)
        steps = np.clip(np.rint(LOUDEST + STEPS_PER_DB * decibels), 0, LOUDEST)
        return bytes(steps.astype(np.uint8))


def decibels(levels: bytes) -> FloatArray:
    """Convert stored levels to dB of full scale, float32 `[frames]`. Silence is -inf."""
    steps = np.frombuffer(levels, np.uint8).astype(np.float32)
    result: FloatArray = np.where(steps > 0, (steps - LOUDEST) / STEPS_PER_DB, -np.inf).astype(
        np.float32
    )
    return result
