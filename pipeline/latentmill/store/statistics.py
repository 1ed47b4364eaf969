"""Mean and deviation of each latent channel, in one pass, merged across units."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from latentmill.record import Latent

BLOCK_FRAMES = 4096


@dataclass(frozen=True)
class ChannelStatistics:
    """Count, mean and sum of squared deviations (M2) of every channel, float64 `[channels]`.

    Merged by the pairwise rule of Chan, Golub and LeVeque (1979).
    """

    frames: int
    mean: npt.NDArray[np.float64]
    m2: npt.NDArray[np.float64]

    @classmethod
    def empty(cls, channels: int) -> ChannelStatistics:
        """The statistics of nothing."""
        return cls(0, np.zeros(channels), np.zeros(channels))

    @classmethod
    def of(cls, latent: Latent) -> ChannelStatistics:
        """The statistics of a latent `[channels, frames]`, or of chunks `[N, channels, frames]`.

        The zero frames that fill up a short last chunk do not count.
        """
        import torch  # slow to import, and not needed to read a store

        total = cls.empty(latent.shape[-2])
        chunks = [*latent[:-1], _without_filling(latent[-1])] if latent.ndim == 3 else [latent]
        for chunk in chunks:
            for start in range(0, chunk.shape[1], BLOCK_FRAMES):
                part = chunk[:, start : start + BLOCK_FRAMES]
                # numpy takes three times as long to widen float16.
                block = torch.tensor(part).double().numpy()
                mean = block.mean(axis=1)
                m2 = ((block - mean[:, None]) ** 2).sum(axis=1)
                total = total.merge(cls(block.shape[1], mean, m2))
        return total

    def merge(self, other: ChannelStatistics) -> ChannelStatistics:
        """The statistics of both."""
        frames = self.frames + other.frames
        if frames == 0:
            return self
        delta = other.mean - self.mean
        mean = self.mean + delta * (other.frames / frames)
        m2 = self.m2 + other.m2 + delta**2 * (self.frames * other.frames / frames)
        return ChannelStatistics(frames, mean, m2)

    @property
    def std(self) -> npt.NDArray[np.float64]:
        """Population standard deviation of every channel."""
        result: npt.NDArray[np.float64] = np.sqrt(self.m2 / max(self.frames, 1))
        return result


def _without_filling(chunk: Latent) -> Latent:
    """A last chunk without the frames at its end in which all channels are exactly 0.

    `Stitcher` adds them to a short last chunk (EnCodec 48 kHz); an encoder does not give them.
    """
    filled = np.flatnonzero(chunk.any(axis=0))
    return chunk[:, : filled[-1] + 1] if len(filled) else chunk
