"""Mean and standard deviation of each latent channel, computed in one pass over all units."""

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
        """Statistics of zero frames."""
        return cls(0, np.zeros(channels), np.zeros(channels))

    @classmethod
    def of(cls, latent: Latent) -> ChannelStatistics:
        """Compute statistics of a latent `[channels, frames]` or chunks `[N, channels, frames]`.

        The zero frames that pad a short last chunk are not included.
        """
        import torch  # slow to import and not needed for reading a store

        total: ChannelStatistics | None = None
        chunks = list(latent) if latent.ndim == 3 else [latent]
        if latent.ndim == 3:
            # `Stitcher` pads a short last chunk with frames in which all channels are exactly 0
            # (EnCodec 48 kHz); encoders never output them.
            nonzero = np.flatnonzero(chunks[-1].any(axis=0))
            chunks[-1] = chunks[-1][:, : nonzero[-1] + 1] if len(nonzero) else chunks[-1]
        for chunk in chunks:
            for start in range(0, chunk.shape[1], BLOCK_FRAMES):
                part = chunk[:, start : start + BLOCK_FRAMES]
                # numpy takes three times as long to widen float16.
                block = torch.tensor(part, device="cpu").double().numpy()
                mean = block.mean(axis=1)
                m2 = ((block - mean[:, None]) ** 2).sum(axis=1)
                found = cls(block.shape[1], mean, m2)
                total = found if total is None else total.merge(found)
        return total or cls.empty(latent.shape[-2])

    def merge(self, other: ChannelStatistics) -> ChannelStatistics:
        """Return the statistics of both sets of frames."""
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
