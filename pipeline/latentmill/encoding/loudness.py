"""How loud an item is, latent frame by latent frame: one byte a frame, measured as it is encoded.

Which stem plays where is known from it without decoding anything. A byte v stands for
(v - 255) / 2 dB of RMS over all channels, full scale being 0 dB; 0 is -127.5 dB or less, silence.
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

    The level of frame n is that of the samples n * hop to (n + 1) * hop, its own; where a frame
    begins before those (`overhang` is negative, as with `mdct`), of the hop before too.
    """

    def __init__(self, spec: ModelSpec) -> None:
        self._hop = spec.hop
        self._looks_back = spec.overhang < 0
        self._power: list[npt.NDArray[np.float64]] = []  # of whole hops: the mean square
        self._rest: npt.NDArray[np.float64] = np.zeros(0)  # squares of the hop that is not full

    def push(self, block: FloatArray) -> None:
        """Take the next samples `[C, n]`."""
        squares = np.square(block, dtype=np.float64).mean(axis=0)
        squares = np.concatenate([self._rest, squares])
        whole = len(squares) // self._hop * self._hop
        self._power.append(squares[:whole].reshape(-1, self._hop).mean(axis=1))
        self._rest = squares[whole:].copy()

    def finish(self, frames: int) -> bytes:
        """The levels of the item's first `frames` latent frames, one byte each."""
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
    """Stored levels in dB of full scale, float32 `[frames]`; silence is -inf."""
    steps = np.frombuffer(levels, np.uint8).astype(np.float32)
    result: FloatArray = np.where(steps > 0, (steps - LOUDEST) / STEPS_PER_DB, -np.inf).astype(
        np.float32
    )
    return result
