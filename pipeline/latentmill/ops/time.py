"""Arithmetic along time: fade, crossfade, and changing the length of latents."""

from __future__ import annotations

from typing import Literal

import numpy as np

from latentmill.errors import ConfigError
from latentmill.ops.arithmetic import combine
from latentmill.ops.origin import Origin
from latentmill.record import FloatArray, Latent, LatentLike, as_array

Shape = Literal["linear", "power"]


def fade(
    latent: LatentLike,
    fade_in: int = 0,
    fade_out: int = 0,
    *,
    shape: Shape = "linear",
    origin: Origin | None,
) -> FloatArray:
    """The latent of a sound that is faded in and out.

    Args:
        latent: `[C, T]`.
        fade_in: Length of the fade at the start, in frames.
        fade_out: Length of the fade at the end, in frames.
        shape: `linear` in amplitude, or `power`: the first quarter of a sine.
        origin: The latent of silence; None for the raw form.

    Returns:
        `[C, T]`, float32.

    Raises:
        ConfigError: As in `mix`, or a fade is longer than the latent.
    """
    frames = latent.shape[-1]
    curve = np.ones(frames, np.float32)
    for length, ends in ((fade_in, curve), (fade_out, curve[::-1])):
        if not 0 <= length <= frames:
            raise ConfigError(
                f"A fade of {length} frames does not fit into {frames} frames: use 0 to {frames}."
            )
        ends[:length] *= rising(length, shape)
    return combine([latent], [curve], origin, stacklevel=2)


def crossfade(
    latent: LatentLike,
    other: LatentLike,
    frames: int,
    *,
    shape: Shape = "linear",
    origin: Origin | None,
) -> FloatArray:
    """The latent of a crossfade from one sound to another.

    Args:
        latent: `[C, T]`, the first sound.
        other: `[C, U]`, the second sound.
        frames: Length of the crossfade in frames.
        shape: `linear`, for similar sounds: the gains add up to 1. `power`, for different sounds:
            the squares of the gains add up to 1.
        origin: The latent of silence; None for the raw form.

    Returns:
        `[C, T + U - frames]`, float32.

    Raises:
        ConfigError: As in `mix`, or a latent is shorter than the crossfade.
    """
    first: Latent = as_array(latent)
    second: Latent = as_array(other)
    shortest = min(first.shape[-1], second.shape[-1])
    if first.ndim != 2 or second.ndim != 2:
        raise ConfigError(
            "Latents stored as chunks (stitch none) cannot be crossfaded: encode with another "
            "stitch."
        )
    if len(first) != len(second):
        raise ConfigError(
            f"Latents of {len(first)} and {len(second)} channels cannot be crossfaded: take both "
            "from stores of one model."
        )
    if not 0 <= frames <= shortest:
        raise ConfigError(
            f"A crossfade of {frames} frames does not fit into {shortest} frames: use 0 to "
            f"{shortest}."
        )
    before = first.shape[1] - frames
    total = before + second.shape[1]
    up = rising(frames, shape)
    here = None if origin is None else origin.at(total, before)
    both = combine([first[:, before:], second[:, :frames]], [up[::-1], up], here, stacklevel=2)
    parts = [first[:, :before], both, second[:, frames:]]
    return np.concatenate([part.astype(np.float32, copy=False) for part in parts], axis=1)


def rising(frames: int, shape: Shape) -> FloatArray:
    """Gains of a fade-in, at the middle of each frame, `[frames]`.

    Reversed they are the gains of the fade-out. The sum of both, or of their squares, is 1.
    """
    line = (np.arange(frames, dtype=np.float32) + np.float32(0.5)) / np.float32(max(frames, 1))
    if shape not in ("linear", "power"):
        raise ConfigError(f"Invalid shape of a fade {shape!r}: use linear or power.")
    return line if shape == "linear" else np.sin(np.float32(np.pi / 2) * line)


def fit(latent: LatentLike, frames: int, *, origin: Origin | None, offset: int = 0) -> FloatArray:
    """The latent of a sound in `frames` frames: truncated, or with silence before and after it.

    Args:
        latent: `[C, T]`.
        frames: Length of the result.
        origin: The latent of silence. None extends with zeros, which are silence only for a linear
            encoder.
        offset: Frame at which the sound begins; a negative one removes its first frames.

    Returns:
        `[C, frames]`, float32.

    Raises:
        ConfigError: The latent consists of chunks `[N, C, T]`.
    """
    given: Latent = as_array(latent)
    if given.ndim != 2:
        raise ConfigError(
            "The length of latents stored as chunks (stitch none) cannot be changed: encode with "
            "another stitch."
        )
    first, last = span(given.shape[1], frames, offset)
    result: FloatArray = np.zeros((given.shape[0], frames), np.float32)
    result[:, first:last] = given[:, first - offset : last - offset]
    if origin is not None and last - first < frames:
        origin.check(given)
        result[:, :first] = origin.crop(frames, 0, first)
        result[:, last:] = origin.crop(frames, last, frames - last)
    return result


def span(have: int, frames: int, offset: int) -> tuple[int, int]:
    """The frames, first and after the last, that `fit` takes from a latent of `have` frames."""
    first = min(max(0, offset), frames)
    return first, max(first, min(frames, offset + have))
