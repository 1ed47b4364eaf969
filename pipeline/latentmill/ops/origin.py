"""The latent of silence and other properties of a store's latents that arithmetic needs."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from latentmill.encoding.chunks import Chunking, Stitcher
from latentmill.errors import ConfigError
from latentmill.record import DTYPES, FloatArray, Latent

# Relative error above which the arithmetic is called poor: the result is then less than 12 dB above
# the error. For removing a sound, the SI-SDR in dB below which it is called poor.
POOR = 0.25
POOR_DB = 12.0


class LinearityWarning(UserWarning):
    """The measured error of an operation is large for this model; the result may sound wrong."""


@dataclass(frozen=True)
class Linearity:
    """A store's linearity card: the relative errors (relL2) that `latentmill evaluate` measured.

    Attributes:
        homogeneity: Error of scaling a latent, with the origin.
        homogeneity_raw: Error of scaling a latent, without the origin.
        additivity: Error of adding latents, with the origin.
        additivity_raw: Error of adding latents, without the origin.
        removal: SI-SDR in dB of a mixture without one of its sounds, with the origin; None if it
            was not measured.
        removal_raw: The same, without the origin.
    """

    homogeneity: float
    homogeneity_raw: float
    additivity: float
    additivity_raw: float
    removal: float | None = None
    removal_raw: float | None = None


@dataclass(frozen=True)
class Origin:
    """The latent of silence, E(0), for items of any length.

    Attributes:
        frames: E(0) of one chunk, float32 `[channels, chunk frames]`.
        chunking: Chunking of the store's items. Silence that is longer than one chunk is stitched
            from this chunk in the same way. Without it the middle frame is repeated, which is the
            same if silence is constant away from a chunk's borders (`stitch: trim`). With `stitch:
            state` the last frame is repeated, because the model is causal.
        deviations: Number of the channels, at the end, that are standard deviations of the others.
        codes: Whether the latents are codes, for which there is no arithmetic.
        linearity: The linearity of the model on the store's audio, if it was measured.
        is_raw: Whether this is the result of `raw()`.
        place: Position of a crop, set by `at`: the item's number of frames, and the crop's first
            frame.
        changes: Functions that were applied to the latents, such as a normalisation. They are also
            applied to the latent of silence when it is computed.

    The silence of an item shorter than a chunk has the chunk's borders. This is exact if a frame
    does not depend on the chunk's length, and an approximation for an encoder that normalises over
    the chunk.
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
        """An origin for the raw form: zeros as the latent of silence; the rest is the same."""
        return replace(self, frames=np.zeros_like(self.frames), is_raw=True, changes=())

    def of_length(self, frames: int) -> FloatArray:
        """The origin of an item of `frames` latent frames, `[channels, frames]`."""
        return self.crop(frames, 0, frames)

    def crop(self, total: int, start: int, frames: int) -> FloatArray:
        """Frames `start` to `start + frames` of the origin of an item of `total` frames.

        Returns:
            `[channels, frames]`. The cost depends on `frames`, not on the item's length.
        """
        have = self.frames.shape[1]
        if not frames or self._is_zero:
            silence = np.zeros((len(self.frames), frames), np.float32)
        elif self.chunking is not None and self.chunking.stitch == "state":
            silence = self.frames[:, np.arange(start, start + frames).clip(max=have - 1)]
        elif self.chunking is not None and self.chunking.stitch != "none" and total > have:
            silence = self._stitched(self.chunking, total, start, frames)
        else:
            left = min(total, have) // 2
            right = min(total, have) - left
            place = np.arange(start, start + frames)
            at = np.where(place < left, place, have // 2)
            at = np.where(place >= total - right, place - total + have, at)
            silence = self.frames[:, at]
        for change in self.changes:
            silence = change(silence)
        return silence

    @cached_property
    def _is_zero(self) -> bool:
        """Whether silence has zeros as its latent, as with every linear encoder."""
        return not self.frames.any()

    def at(self, total: int, start: int) -> Origin:
        """The origin for arithmetic on crops that begin at `start` in items of `total` frames.

        If a crop extends beyond the item's end, the rest is silence.
        """
        return replace(self, place=(total, start))

    def _stitched(self, chunking: Chunking, total: int, start: int, frames: int) -> FloatArray:
        """Stitch only the chunks around the crop; the others do not change its frames."""
        have = self.frames.shape[1]
        step = have - chunking.overlap
        starts = [*range(0, total - have, step), total - have]
        first = max(0, (start - have) // step - 1)
        last = min(len(starts), (start + frames) // step + 2)
        if last >= len(starts) - 1:  # the last chunk starts earlier and overlaps more
            last = len(starts)
            first = max(0, min(first, last - 3))
        stitcher = Stitcher(chunking, DTYPES["float32"], (last - first) * have)
        for chunk in starts[first:last]:
            stitcher.add(chunk - starts[first], self.frames)
        begin = start - starts[first]
        return stitcher.finish()[:, begin : begin + frames].astype(np.float32, copy=False)

    def like(self, latent: Latent) -> FloatArray:
        """The origin of a latent `[C, T]`, or of chunks `[N, C, T]`, in the same shape.

        Raises:
            ConfigError: The latent has a different number of channels.
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
        """Check that a latent may belong to this origin.

        Raises:
            ConfigError: The latent has a different number of channels.
        """
        if latent.shape[-2] != len(self.frames):
            raise ConfigError(
                f"The origin has {len(self.frames)} channels and the latents {latent.shape[-2]}: "
                "use the origin of the store that they come from."
            )

    def check_arithmetic(self) -> None:
        """Check that the latents can be scaled and added.

        Raises:
            ConfigError: The latents are codes.
        """
        if self.codes:
            raise ConfigError(
                "These latents are codes, which cannot be scaled or added: encode without the "
                "option output=codes."
            )

    def warn(self, *, adds: bool, subtracts: bool, scales: bool, stacklevel: int) -> None:
        """Warn if the store's linearity card calls an operation poor.

        Each operation has its own metric: homogeneity for scaling, additivity for adding, removal
        of stems for subtracting. Cards of earlier versions have no removal: additivity is used
        instead.

        Args:
            adds: Whether sounds are added.
            subtracts: Whether a sound is subtracted from others.
            scales: Whether a sound is scaled.
            stacklevel: As in `warnings.warn`, relative to this method.
        """
        card = self.linearity
        if card is None:
            return
        homogeneity = card.homogeneity_raw if self.is_raw else card.homogeneity
        additivity = card.additivity_raw if self.is_raw else card.additivity
        removal = card.removal_raw if self.is_raw else card.removal
        adds = adds or (subtracts and removal is None)
        found = [
            (scales and homogeneity > POOR, "Scaling a latent", _error_text(homogeneity)),
            (adds and additivity > POOR, "Adding latents", _error_text(additivity)),
        ]
        if removal is not None:
            text = f"SI-SDR measured on the store's audio is {removal:.1f} dB (limit {POOR_DB:g})"
            found.append((subtracts and removal < POOR_DB, "Subtracting latents", text))
        for poor, what, text in found:
            if poor:
                warnings.warn(
                    f"{what} is poor for this model: the {text}.",
                    LinearityWarning,
                    stacklevel=stacklevel + 1,
                )


def _error_text(error: float) -> str:
    return f"relative error measured on the store's audio is {error:.2f} (limit {POOR})"
