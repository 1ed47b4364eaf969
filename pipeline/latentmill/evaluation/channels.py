"""Statistics of latent channels that the commits do not have, collected block by block."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from latentmill.record import FloatArray

LAGS = (1, 2, 4, 8, 16, 32)  # frames
FloatVector = npt.NDArray[np.float64]


class ChannelMoments:
    """Range, saturation, covariance and autocorrelation of channels with a known mean."""

    def __init__(self, mean: FloatVector) -> None:
        channels = len(mean)
        self._mean = torch.from_numpy(mean.astype(np.float32))
        self.frames = 0
        self.low, self.high = np.full(channels, np.inf), np.full(channels, -np.inf)
        self._at_low, self._at_high = (np.zeros(channels, np.int64) for _ in range(2))
        # Of the frames that count for saturation.
        self._sounding = 0
        self._least, self._most = np.full(channels, np.inf), np.full(channels, -np.inf)
        self._products = torch.zeros(channels, channels, dtype=torch.float64, device="cpu")
        self._lagged = np.zeros((len(LAGS), channels))
        self._pairs = np.zeros(len(LAGS), np.int64)

    def add(
        self, frames: torch.Tensor, lengths: npt.NDArray[np.int64], silent: npt.NDArray[np.bool_]
    ) -> None:
        """Add the frames `[F, D]` of records with these lengths; silent ones cannot saturate."""
        centered = frames - self._mean
        self._products += (centered.T @ centered).double()
        self.frames += len(frames)
        owner = torch.from_numpy(np.repeat(np.arange(len(lengths)), lengths))
        for row, lag in enumerate(LAGS):
            same = owner[lag:] == owner[:-lag]
            if not same.any():
                continue
            products = centered[lag:] * centered[:-lag]
            self._lagged[row] += (same.float() @ products).numpy()
            self._pairs[row] += int(same.sum())
        least, most = frames.amin(dim=0), frames.amax(dim=0)
        self.low = np.minimum(self.low, least.numpy())
        self.high = np.maximum(self.high, most.numpy())
        if silent.any():
            frames = frames[torch.from_numpy(~silent)[owner]]
            if not len(frames):
                return
            least, most = frames.amin(dim=0), frames.amax(dim=0)
        self._count_extremes(frames, least, most)

    def _count_extremes(
        self, sounding: torch.Tensor, least: torch.Tensor, most: torch.Tensor
    ) -> None:
        """Count the values that equal the extremes so far; a new extreme starts again."""
        self._sounding += len(sounding)
        for name, extreme, better in (
            ("_least", least.numpy(), np.less),
            ("_most", most.numpy(), np.greater),
        ):
            counts = self._at_low if name == "_least" else self._at_high
            known = getattr(self, name)
            new = better(extreme, known)
            known[new] = extreme[new]
            counts[new] = 0
            reached = np.flatnonzero(extreme == known)  # few, after the first blocks
            equal = sounding[:, reached] == torch.from_numpy(known[reached].astype(np.float32))
            counts[reached] += torch.count_nonzero(equal, dim=0).numpy()

    def merge(self, other: ChannelMoments) -> None:
        """Add what another one collected, about the same channels and mean."""
        self._products += other._products
        self.frames += other.frames
        self._lagged += other._lagged
        self._pairs += other._pairs
        self.low = np.minimum(self.low, other.low)
        self.high = np.maximum(self.high, other.high)
        self._sounding += other._sounding
        for better, extreme, counts, theirs, more in (
            (np.less, self._least, self._at_low, other._least, other._at_low),
            (np.greater, self._most, self._at_high, other._most, other._at_high),
        ):
            counts[:] = np.where(better(theirs, extreme), 0, counts) + np.where(
                better(extreme, theirs), 0, more
            )
            extreme[:] = np.where(better(theirs, extreme), theirs, extreme)

    @property
    def saturation(self) -> FloatVector:
        """Share of the frames in which a channel has its largest or its smallest value."""
        share: FloatVector = (self._at_low + self._at_high) / max(1, self._sounding)
        return np.where(self.high > self.low, share, 0.0)

    @property
    def covariance(self) -> FloatVector:
        result: FloatVector = (self._products / max(1, self.frames)).numpy()
        return result

    def effective_rank(self, channels: int) -> float:
        """exp(entropy of the eigenvalues of the covariance), Roy and Vetterli 2007.

        Of the first `channels` channels.
        """
        values = np.linalg.eigvalsh(self.covariance[:channels, :channels]).clip(min=0)
        if values.sum() == 0:
            return 0.0
        shares = values / values.sum()
        shares = shares[shares > 0]
        return float(np.exp(-(shares * np.log(shares)).sum()))

    @property
    def autocorrelation(self) -> dict[int, FloatVector]:
        """Correlation of each channel with itself, by distance in frames; 0 if it is constant."""
        variance = np.diag(self.covariance)
        found: dict[int, Any] = {}
        for lag, sums, pairs in zip(LAGS, self._lagged, self._pairs, strict=True):
            if pairs:
                mean = sums / pairs
                found[lag] = np.divide(mean, variance, np.zeros_like(mean), where=variance > 0)
        return found


class Pooling:
    """Computes two short vectors for each record, for finding duplicates and outliers.

    `positions` follow a record through time: the mean and the RMS of each channel in eighths of
    the record, with the origin removed, divided by their norm, so that gain does not change it, and
    projected to 64 numbers. `shapes` are the logarithms of the RMS in up to 64 bands of
    neighbouring channels, relative to the RMS of the whole record.
    """

    PARTS, SIZE, FLOOR = 8, 64, 0.05

    def __init__(self, origin: FloatArray) -> None:
        self._origin = torch.from_numpy(origin.astype(np.float32))
        channels = len(origin)
        random = np.random.default_rng(0)
        directions = random.standard_normal((2 * self.PARTS * channels, self.SIZE))
        self._directions = directions.astype(np.float32)
        self._starts = np.arange(min(channels, self.SIZE)) * channels // min(channels, self.SIZE)

    @property
    def bands(self) -> int:
        """Size of the vectors of `shapes`."""
        return len(self._starts)

    def __call__(
        self, frames: torch.Tensor, lengths: npt.NDArray[np.int64]
    ) -> tuple[FloatArray, FloatArray]:
        """Positions `[N, 64]` and shapes `[N, bands]` of N records with the frames `[F, D]`."""
        values = (frames - self._origin).numpy()
        count, channels = len(lengths), values.shape[1]
        first = np.cumsum(lengths) - lengths
        parts = first[:, None] + np.arange(self.PARTS) * lengths[:, None] // self.PARTS
        ends = np.append(parts.ravel()[1:], len(values))
        sizes = np.maximum(1, ends - parts.ravel())[:, None]
        # Equal borders, of records with fewer frames than parts, give the frame itself.
        mean = np.add.reduceat(values, parts.ravel(), axis=0) / sizes
        power = np.add.reduceat(np.square(values), parts.ravel(), axis=0) / sizes
        vectors = np.concatenate(
            [mean.reshape(count, -1), np.sqrt(power).reshape(count, -1)], axis=1
        )
        vectors /= np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-30)
        positions = vectors @ self._directions
        positions /= np.maximum(np.linalg.norm(positions, axis=1, keepdims=True), 1e-30)
        mean_power = power.reshape(count, self.PARTS, channels).mean(axis=1)
        widths = np.diff(np.append(self._starts, channels))
        bands = np.add.reduceat(mean_power, self._starts, axis=1) / widths
        whole = np.maximum(mean_power.mean(axis=1, keepdims=True), 1e-30)
        return positions, np.log(np.sqrt(bands / whole) + self.FLOOR)
