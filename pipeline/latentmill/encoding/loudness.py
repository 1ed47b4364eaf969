"""Loudness of an item in each latent frame: one byte per frame, measured while it is encoded.

It shows when a stem is audible, without decoding its latents. A byte v stands for (v - 255) / 2 dB
of RMS over all channels, full scale being 0 dB; 0 is -127.5 dB or less, silence.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from latentmill.models.base import ModelSpec
from latentmill.record import LOUDEST, STEPS_PER_DB, FloatArray, decibels

SILENT_DB = -60.0  # a frame below this level counts as silent
AUDIBLE_DB = 30.0  # below the loudest frame of a record
SEARCHED = 600.0  # seconds from the start in which the loudest part is searched


class LevelMeter:
    """Measures one item's audio, block by block.

    The level of frame n is that of its own samples, n * hop to (n + 1) * hop. If frames start
    earlier than that (`overhang` is negative, as with `mdct`), the level includes the hop before.
    """

    def __init__(self, spec: ModelSpec) -> None:
        self._hop = spec.hop
        self._looks_back = spec.overhang < 0
        self._power: list[npt.NDArray[np.float64]] = []  # of whole hops: the mean square
        self._rest = 0.0  # sum of the squares of the hop that is not full, mean over the channels
        self._count = 0  # its samples

    def push(self, block: FloatArray) -> None:
        """Add the next samples `[C, n]`."""
        samples = block.shape[1]
        begin = min(samples, -self._count % self._hop)  # fills the hop that is not full
        whole = (samples - begin) // self._hop
        end = begin + whole * self._hop
        if begin:
            self._add(block[:, :begin])
        if whole:
            # Row by row, and not the whole array: these are views, so that nothing is copied.
            energies = [_energies(channel[begin:end].reshape(whole, -1)) for channel in block]
            self._power.append(np.mean(energies, axis=0, dtype=np.float64) / self._hop)
        if end < samples:
            self._add(block[:, end:])

    def _add(self, part: FloatArray) -> None:
        """Add to the hop that is not full."""
        self._rest += sum(float(np.dot(channel, channel)) for channel in part) / len(part)
        self._count += part.shape[1]
        if self._count == self._hop:
            self._power.append(np.array([self._rest / self._hop]))
            self._rest, self._count = 0.0, 0

    def finish(self, frames: int) -> bytes:
        """Return the levels of the first `frames` latent frames, one byte each."""
        last = [self._rest / self._count] if self._count else []
        measured = np.concatenate([*self._power, last])
        power = np.zeros(max(frames, len(measured) + 1))
        power[: len(measured)] = measured
        if self._looks_back:
            power[1 : len(measured) + 1] += measured
            power /= 2
        power = power[:frames]
        with np.errstate(divide="ignore"):
            decibels = 10 * np.log10(power)
        steps = np.clip(np.rint(LOUDEST + STEPS_PER_DB * decibels), 0, LOUDEST)
        return bytes(steps.astype(np.uint8))


def _energies(hops: FloatArray) -> FloatArray:
    """The sum of the squares of each row of `[hops, n]`. `np.einsum` takes twice as long."""
    energies: FloatArray = np.matmul(hops[:, None, :], hops[:, :, None])[:, 0, 0]
    return energies


def silent_frames(levels: bytes) -> npt.NDArray[np.bool_]:
    """Which frames are below SILENT_DB, from stored levels."""
    silent: npt.NDArray[np.bool_] = (
        np.frombuffer(levels, np.uint8) < LOUDEST + STEPS_PER_DB * SILENT_DB
    )
    return silent


def loudest_part(
    records: Iterable[bytes | None], total: int, frames: int, frames_per_second: float
) -> int:
    """The first frame of the loudest `frames` of `total` frames, in the first 10 minutes.

    `records` has the stored levels of one record, or of several that play together. Audio is read
    from its start, so a part that is far from it would take long to load and much memory.
    """
    searched = min(total, max(frames, round(SEARCHED * frames_per_second)))
    power = np.zeros(searched)
    for levels in records:
        found = decibels((levels or b"")[:searched]).astype(np.float64)
        power[: len(found)] += 10 ** (found / 10)
    return _largest_part(power, frames)


def busiest_part(
    records: Iterable[bytes | None], total: int, frames: int, frames_per_second: float
) -> int:
    """The first frame of the part in which the most records are audible, as in `loudest_part`.

    The loudest part of several stems would often have one stem only.
    """
    searched = min(total, max(frames, round(SEARCHED * frames_per_second)))
    audible = np.zeros(searched)
    for levels in records:
        found = decibels((levels or b"")[:searched])
        audible[: len(found)] += found > max(SILENT_DB, found.max(initial=-np.inf) - AUDIBLE_DB)
    return _largest_part(audible, frames)


def _largest_part(values: npt.NDArray[np.float64], frames: int) -> int:
    sums = np.cumsum(np.append(0.0, values))
    return int((sums[frames:] - sums[:-frames]).argmax()) if frames < len(values) else 0
