"""Latent arithmetic: what sounds added, scaled and taken away are in latent space.

An affine encoder has E(x) = L(x) + c with c = E(0), the latent of silence. A sum of sounds
a_1 x_1 + ... + a_K x_K then has the latent

    z = sum(a_i z_i) + (1 - sum(a_i)) c

which is exact for an affine encoder. `origin=None` gives the raw form without c.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from latentmill.chunks import Chunking, Stitcher
from latentmill.errors import ConfigError
from latentmill.record import DTYPES, Latent

Float = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Origin:
    """The latent of silence, E(0), for items of any length.

    Attributes:
        frames: E(0) of one chunk, float32 `[channels, chunk frames]`.
        chunking: How the store's items were chunked: a longer silence is then stitched from this
            chunk as its items are. Without it the middle frame is repeated, which is the same
            where silence is constant away from a chunk's borders (`stitch: trim`).

    A shorter item gets the chunk's borders: exact where a frame does not depend on the chunk's
    length, an approximation for an encoder that normalises over the chunk.
    """

    frames: Float
    chunking: Chunking | None = None

    def of_length(self, frames: int) -> Float:
        """The origin of an item of `frames` latent frames, `[channels, frames]`."""
        have = self.frames.shape[1]
        if self.chunking is not None and self.chunking.stitch != "none" and frames > have:
            return self._stitched(self.chunking, frames)
        left = min(frames, have) // 2
        right = min(frames, have) - left
        middle = np.repeat(self.frames[:, have // 2, None], max(0, frames - have), axis=1)
        return np.concatenate(
            [self.frames[:, :left], middle, self.frames[:, have - right :]], axis=1
        )

    def _stitched(self, chunking: Chunking, frames: int) -> Float:
        have = self.frames.shape[1]
        stitcher = Stitcher(chunking, DTYPES["float32"], frames)
        for start in [*range(0, frames - have, have - chunking.overlap), frames - have]:
            stitcher.add(start, self.frames)
        return stitcher.finish().astype(np.float32, copy=False)

    def like(self, latent: Latent) -> Float:
        """The origin of an item with this latent: `[C, T]`, or `[N, C, T]` for chunks.

        Raises:
            ConfigError: The latent has other channels.
        """
        if latent.shape[-2] != len(self.frames):
            raise ConfigError(
                f"The origin has {len(self.frames)} channels and the latents {latent.shape[-2]}: "
                "take the origin of the store that they come from."
            )
        return np.broadcast_to(self.of_length(latent.shape[-1]), latent.shape)


def mix(
    latents: Sequence[Latent],
    gains: Sequence[float] | None = None,
    *,
    origin: Origin | None = None,
) -> Float:
    """The latent of sum(gain_i * sound_i).

    Args:
        latents: Latents `[C, T]` of sounds on one time line, all of one shape.
        gains: One gain per latent; default 1 each. A negative gain takes a sound away.
        origin: The latent of silence of these latents' store; None for the raw sum.

    Returns:
        `[C, T]`, float32.

    Raises:
        ConfigError: No latents, different shapes, another number of gains, or a foreign origin.
    """
    gains = [1.0] * len(latents) if gains is None else list(gains)
    if not latents:
        raise ConfigError("mix needs at least one latent.")
    if len(gains) != len(latents):
        raise ConfigError(f"mix needs one gain per latent: {len(latents)} and {len(gains)} given.")
    shapes = {latent.shape for latent in latents}
    if len(shapes) > 1:
        listed = ", ".join(str(shape) for shape in sorted(shapes))
        raise ConfigError(
            f"Latents of different shapes cannot be mixed: {listed}; bring them to one length "
            "(`fit`; on the command line --length shortest or longest)."
        )
    total: Float = np.zeros(latents[0].shape, np.float32)
    for latent, gain_ in zip(latents, gains, strict=True):
        total += np.float32(gain_) * latent.astype(np.float32)
    rest = 1.0 - float(np.sum(gains))
    if origin is not None and rest != 0.0:
        total += np.float32(rest) * origin.like(latents[0])
    return total


def fit(latent: Latent, frames: int, *, origin: Origin | None = None) -> Float:
    """The latent of a sound cut, or continued by silence, to `frames` latent frames.

    Args:
        latent: `[C, T]`.
        frames: Length of the result.
        origin: The latent of silence, which the sound is continued by; None: zeros, which are
            silence only where the encoder is linear.

    Raises:
        ConfigError: The latent is chunks `[N, C, T]`, whose length cannot be changed.
    """
    if latent.ndim != 2:
        raise ConfigError("Latents stored as chunks (stitch none) cannot be cut or continued.")
    have = latent.shape[1]
    result: Float = np.zeros((latent.shape[0], frames), np.float32)
    result[:, : min(have, frames)] = latent[:, :frames]
    if origin is not None and frames > have:
        result[:, have:] = origin.like(result)[:, have:]
    return result


def gain(latent: Latent, factor: float, *, origin: Origin | None = None) -> Float:
    """The latent of a sound made `factor` times as loud; see `mix`."""
    return mix([latent], [factor], origin=origin)


def subtract(latent: Latent, other: Latent, *, origin: Origin | None = None) -> Float:
    """The latent of a mixture without one of its sounds; see `mix`."""
    return mix([latent, other], [1.0, -1.0], origin=origin)
