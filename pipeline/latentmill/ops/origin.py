"""The latent of silence, and what else arithmetic must know of a store's latents."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from latentmill.encoding.chunks import Chunking, Stitcher
from latentmill.errors import ConfigError
from latentmill.record import DTYPES, FloatArray, Latent

# A relative error of the arithmetic above which it is called poor: the result is then at most
# 12 dB above what is wrong with it.
POOR = 0.25


class LinearityWarning(UserWarning):
    """The model was measured to be a poor one for an operation; the result may sound wrong."""


@dataclass(frozen=True)
class Linearity:
    """A store's linearity card: the errors of `latentmill linearity`, relative (relL2).

    Attributes:
        homogeneity: Error of a sound's latent made louder or softer, with the origin.
        homogeneity_raw: The same without the origin.
        additivity: Error of a sum of latents, with the origin.
        additivity_raw: The same without the origin.
    """

    homogeneity: float
    homogeneity_raw: float
    additivity: float
    additivity_raw: float


@dataclass(frozen=True)
class Origin:
    """The latent of silence, E(0), for items of any length.

    Attributes:
        frames: E(0) of one chunk, float32 `[channels, chunk frames]`.
        chunking: How the store's items were chunked: a longer silence is then stitched from this
            chunk as its items are. Without it the middle frame is repeated, which is the same
            where silence is constant away from a chunk's borders (`stitch: trim`).
        deviations: How many of the channels, the last ones, are standard deviations of the others.
        codes: Whether the latents are codes, which no arithmetic holds for.
        linearity: What was measured of the model on the store's audio, if it was.
        is_raw: Whether this is the origin of `raw()`.
        place: Where `at` puts the latents: an item's frames, and the first one of them.
        changes: What was done to the latents since, channel by channel, such as a normalisation;
            it is done to their silence, too, when that is asked for.

    A shorter item gets the chunk's borders: exact where a frame does not depend on the chunk's
    length, an approximation for an encoder that normalises over the chunk.
    """

    frames: FloatArray
    chunking: Chunking | None = None
    deviations: int = 0
    codes: bool = False
    linearity: Linearity | None = None
    is_raw: bool = False
    place: tuple[int, int] | None = None
    changes: tuple[Callable[[FloatArray], FloatArray], ...] = ()

    def raw(self) -> Origin:
        """Zeros for the latent of silence: the raw form, with all else that is known."""
        return replace(self, frames=np.zeros_like(self.frames), is_raw=True, changes=())

    def of_length(self, frames: int) -> FloatArray:
        """The origin of an item of `frames` latent frames, `[channels, frames]`."""
        return self.crop(frames, 0, frames)

    def crop(self, total: int, start: int, frames: int) -> FloatArray:
        """Frames `start` to `start + frames` of the origin of an item of `total` frames.

        Returns:
            `[channels, frames]`; costs what these frames cost, however long the item is.
        """
        silence = self._stored(total, start, frames)
        for change in self.changes:
            silence = change(silence)
        return silence

    def _stored(self, total: int, start: int, frames: int) -> FloatArray:
        have = self.frames.shape[1]
        if self.chunking is not None and self.chunking.stitch != "none" and total > have:
            return self._stitched(self.chunking, total, start, frames)
        left = min(total, have) // 2
        right = min(total, have) - left
        place = np.arange(start, start + frames)
        at = np.where(place < left, place, have // 2)
        at = np.where(place >= total - right, place - total + have, at)
        return self.frames[:, at]

    def at(self, total: int, start: int) -> Origin:
        """The origin for arithmetic on crops that begin at `start` in items of `total` frames.

        Of a crop that goes on after the item's end, the rest is taken for silence.
        """
        return replace(self, place=(total, start))

    def _stitched(self, chunking: Chunking, total: int, start: int, frames: int) -> FloatArray:
        """Stitch only the chunks around the crop: a frame's neighbours settle what it is."""
        have = self.frames.shape[1]
        step = have - chunking.overlap
        starts = [*range(0, total - have, step), total - have]
        first = max(0, (start - have) // step - 1)
        last = min(len(starts), (start + frames) // step + 2)
        if last >= len(starts) - 1:  # the last chunk is moved back, over the one before
            last = len(starts)
            first = max(0, min(first, last - 3))
        stitcher = Stitcher(chunking, DTYPES["float32"], (last - first) * have)
        for chunk in starts[first:last]:
            stitcher.add(chunk - starts[first], self.frames)
        begin = start - starts[first]
        return stitcher.finish()[:, begin : begin + frames].astype(np.float32, copy=False)

    def like(self, latent: Latent) -> FloatArray:
        """The origin of this latent: `[C, T]`, or `[N, C, T]` for chunks.

        Raises:
            ConfigError: As `check`.
        """
        self.check(latent)
        frames = latent.shape[-1]
        total, start = self.place or (frames, 0)
        inside = max(0, min(frames, total - start))
        silence = self.crop(total, start, inside)
        if inside < frames:
            after = self.crop(start + frames, start + inside, frames - inside)
            silence = np.concatenate([silence, after], axis=1)
        return np.broadcast_to(silence, latent.shape)

    def check(self, latent: Latent) -> None:
        """Refuse a latent that this is no origin of.

        Raises:
            ConfigError: The latent has other channels.
        """
        if latent.shape[-2] != len(self.frames):
            raise ConfigError(
                f"The origin has {len(self.frames)} channels and the latents {latent.shape[-2]}: "
                "take the origin of the store that they come from."
            )

    def check_arithmetic(self) -> None:
        """Refuse latents that cannot be added.

        Raises:
            ConfigError: They are codes.
        """
        if self.codes:
            raise ConfigError(
                "These latents are codes, which cannot be scaled or added: encode without the "
                "option output=codes."
            )

    def warn(self, *, adds: bool, scales: bool, stacklevel: int) -> None:
        """Warn if the store's linearity card says that an operation is poor for its model.

        Args:
            adds: Whether sounds are added or taken away.
            scales: Whether a sound is made louder or softer.
            stacklevel: As of `warnings.warn`, from here.
        """
        card = self.linearity
        if card is None:
            return
        homogeneity = card.homogeneity_raw if self.is_raw else card.homogeneity
        additivity = card.additivity_raw if self.is_raw else card.additivity
        for happens, error, what in (
            (scales, homogeneity, "scaling a latent"),
            (adds, additivity, "adding latents"),
        ):
            if happens and error > POOR:
                warnings.warn(
                    f"{what[0].upper()}{what[1:]} is poor for this model: the relative error "
                    f"measured on the store's audio is {error:.2f} (limit {POOR}).",
                    LinearityWarning,
                    stacklevel=stacklevel + 1,
                )
