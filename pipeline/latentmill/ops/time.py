"""Arithmetic along time: fade, crossfade, and bringing latents to one length."""

from __future__ import annotations

from typing import Literal

import numpy as np

from latentmill.errors import ConfigError
from latentmill.ops.arithmetic import combine
from latentmill.ops.origin import Origin
from latentmill.record import FloatArray, Latent

Shape = Literal["linear", "power"]


def fade(
    latent: Latent,
    fade_in: int = 0,
    fade_out: int = 0,
    *,
    shape: Shape = "linear",
    origin: Origin | None,
) -> FloatArray:
    """The latent of a sound that begins and ends in silence.

    Args:
        latent: `[C, T]`.
        fade_in: Frames over which it becomes as loud as it is.
        fade_out: Frames over which it dies away at its end.
        shape: `linear` in amplitude, or `power`: the sine's first quarter.
        origin: The latent of silence; None for the raw form.

    Raises:
        ConfigError: As `mix`, or a fade is longer than the sound.
    """
    frames = latent.shape[-1]
    curve = np.ones(frames, np.float32)
    for length, ends in ((fade_in, curve), (fade_out, curve[::-1])):
        if not 0 <= length <= frames:
            raise ConfigError(f"A fade of {length} frames does not fit into {frames} frames.")
        ends[:length] *= rising(length, shape)
    return combine([latent], [curve], origin, stacklevel=2)


def crossfade(
    latent: Latent,
    other: Latent,
    frames: int,
    *,
    shape: Shape = "linear",
    origin: Origin | None,
) -> FloatArray:
    """The latent of one sound that becomes another.

    Args:
        latent: `[C, T]`, the first sound.
        other: `[C, U]`, the second.
        frames: How many frames they share.
        shape: `linear`, for sounds that are alike, keeps the sum of the gains at 1; `power`, for
            sounds that are not, the sum of their squares.
        origin: The latent of silence; None for the raw form.

    Returns:
        `[C, T + U - frames]`, float32.

    Raises:
        ConfigError: As `mix`, or a sound is shorter than the fade.
    """
    shortest = min(latent.shape[-1], other.shape[-1])
    if latent.ndim != 2 or other.ndim != 2:
        raise ConfigError("Latents stored as chunks (stitch none) cannot be joined in time.")
    if len(latent) != len(other):
        raise ConfigError(
            f"Latents of {len(latent)} and {len(other)} channels cannot be joined: take both from "
            "stores of one model."
        )
    if not 0 <= frames <= shortest:
        raise ConfigError(f"A crossfade of {frames} frames does not fit into {shortest} frames.")
    before = latent.shape[1] - frames
    total = before + other.shape[1]
    up = rising(frames, shape)
    here = None if origin is None else origin.at(total, before)
    both = combine([latent[:, before:], other[:, :frames]], [up[::-1], up], here, stacklevel=2)
    parts = [latent[:, :before], both, other[:, frames:]]
    return np.concatenate([part.astype(np.float32, copy=False) for part in parts], axis=1)


def rising(frames: int, shape: Shape) -> FloatArray:
    """Gains from silence to full, at the frames' middles, `[frames]`.

    Backwards they are the falling gains: with them they add up to 1, or their squares do.

    Raises:
        ConfigError: There is no such shape.
    """
    line = (np.arange(frames, dtype=np.float32) + np.float32(0.5)) / np.float32(max(frames, 1))
    if shape not in ("linear", "power"):
        raise ConfigError(f"The shape of a fade is linear or power, not {shape}.")
    return line if shape == "linear" else np.sin(np.float32(np.pi / 2) * line)


def fit(latent: Latent, frames: int, *, origin: Origin | None) -> FloatArray:
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
    result: FloatArray = np.zeros((latent.shape[0], frames), np.float32)
    result[:, : min(have, frames)] = latent[:, :frames]
    if origin is not None and frames > have:
        origin.check(latent)
        result[:, have:] = origin.crop(frames, have, frames - have)
    return result
