"""Sums of latents: gain, mix, subtract, mixup."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from latentmill.errors import ConfigError
from latentmill.ops.origin import Origin
from latentmill.record import FloatArray, Latent

# One factor for the whole sound, or a curve of one factor a frame.
Gain = float | npt.NDArray[np.floating[Any]]


def mix(
    latents: Sequence[Latent],
    gains: Sequence[Gain] | None = None,
    *,
    origin: Origin | None,
) -> FloatArray:
    """The latent of sum(gain_i * sound_i).

    Args:
        latents: Latents `[C, T]` of sounds on one time line, all of one shape; or all chunks
            `[N, C, T]`.
        gains: One gain per latent, a number or a curve `[T]` of one number a frame; default 1
            each. A negative gain takes a sound away. A curve is exact where it is constant over
            what a frame sees, and close to it where it changes slowly from frame to frame.
        origin: The latent of silence of these latents' store (of a crop: `origin.at`); None
            for the raw sum.

    Returns:
        `[C, T]`, float32. Of means with standard deviations, the means are added and the
        variances, that of silence taken as zero: `sqrt(sum((gain_i * std_i)^2))`.

    Raises:
        ConfigError: No latents, different shapes, another number of gains, a curve of another
            length, codes, or a foreign origin.
    """
    return combine(latents, gains, origin, stacklevel=2)


def gain(latent: Latent, factor: Gain, *, origin: Origin | None) -> FloatArray:
    """The latent of a sound made `factor` times as loud, or by a curve `[T]`; see `mix`."""
    return combine([latent], [factor], origin, stacklevel=2)


def subtract(latent: Latent, other: Latent, *, origin: Origin | None) -> FloatArray:
    """The latent of a mixture without one of its sounds; see `mix`."""
    return combine([latent, other], [1.0, -1.0], origin, stacklevel=2)


def mixup(latent: Latent, other: Latent, weight: Gain, *, origin: Origin | None) -> FloatArray:
    """The latent of weight * sound + (1 - weight) * other, which needs no latent of silence.

    Args:
        latent: `[C, T]`.
        other: Of the same shape.
        weight: 0 to 1, a number or a curve `[T]`.
        origin: As of `mix`; it does not change the result, but says what the latents are.

    Raises:
        ConfigError: As `mix`, or the weight is beyond 0 and 1.
    """
    if np.min(weight) < 0 or np.max(weight) > 1:
        raise ConfigError("The weight of mixup goes from 0 to 1: use mix for other gains.")
    return combine([latent, other], [weight, 1 - weight], origin, stacklevel=2)


def combine(
    latents: Sequence[Latent],
    gains: Sequence[Gain] | None,
    origin: Origin | None,
    *,
    stacklevel: int,
) -> FloatArray:
    """`mix`, for the other functions of this package; a warning names their caller."""
    factors = _factors(latents, gains)
    total: FloatArray = np.zeros(latents[0].shape, np.float32)
    for latent, factor in zip(latents, factors, strict=True):
        total += factor * latent.astype(np.float32)
    if origin is None:
        return total
    origin.check(total)
    origin.check_arithmetic()
    used = [factor for factor in factors if np.any(factor != 0)]
    scales = any(np.any(np.abs(factor) != 1) for factor in used)
    origin.warn(adds=len(used) > 1, scales=scales, stacklevel=stacklevel + 1)
    rest = np.float32(1) - np.sum(factors, axis=0, dtype=np.float64).astype(np.float32)
    if np.any(rest != 0):
        total += rest * origin.like(total)
    if origin.deviations:
        total[..., -origin.deviations :, :] = _deviations(latents, factors, origin.deviations)
    return total


def _deviations(latents: Sequence[Latent], factors: Sequence[FloatArray], rows: int) -> FloatArray:
    """The deviation of a sum of independent parts, `[rows, T]`: their variances add up."""
    parts = [
        np.square(factor * latent[..., -rows:, :].astype(np.float32))
        for latent, factor in zip(latents, factors, strict=True)
    ]
    deviations: FloatArray = np.sqrt(np.sum(parts, axis=0))
    return deviations


def _factors(latents: Sequence[Latent], gains: Sequence[Gain] | None) -> list[FloatArray]:
    """The gains as arrays, `[]` or `[T]`, checked against the latents."""
    if not latents:
        raise ConfigError("mix needs at least one latent.")
    factors = [
        np.asarray(g, np.float32) for g in ([1.0] * len(latents) if gains is None else gains)
    ]
    if len(factors) != len(latents):
        raise ConfigError(
            f"mix needs one gain per latent: {len(latents)} and {len(factors)} given."
        )
    shapes = {latent.shape for latent in latents}
    if len(shapes) > 1:
        listed = ", ".join(str(shape) for shape in sorted(shapes))
        raise ConfigError(
            f"Latents of different shapes cannot be mixed: {listed}; bring them to one length "
            "(`fit`; on the command line --length shortest or longest)."
        )
    for latent, factor in zip(latents, factors, strict=True):
        if factor.ndim and latent.ndim != 2:
            raise ConfigError(
                "A gain curve needs one time line, and these latents are overlapping chunks "
                "(stitch none): give one number per latent."
            )
        if factor.ndim and factor.shape != latent.shape[-1:]:
            raise ConfigError(
                f"A gain curve has one number a frame: {latent.shape[-1]} frames and a curve of "
                f"shape {factor.shape} given."
            )
        if not np.issubdtype(latent.dtype, np.floating):
            raise ConfigError(
                f"Latents of type {latent.dtype} are codes, which cannot be scaled or added."
            )
    return factors
