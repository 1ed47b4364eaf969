"""Sums of latents: gain, mix, subtract, mixup."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from latentmill.errors import ConfigError
from latentmill.ops.origin import Origin
from latentmill.record import FloatArray, Latent, LatentLike, as_array

# One factor for the whole sound, or a curve with one factor per frame.
Gain = float | npt.NDArray[np.floating[Any]]


def mix(
    latents: Sequence[LatentLike] | LatentLike,
    gains: Sequence[Gain] | None = None,
    *,
    origin: Origin | None,
) -> FloatArray:
    """The latent of sum(gain_i * sound_i).

    Args:
        latents: Latents `[C, T]`, or chunks `[N, C, T]`, all of one shape: arrays or tensors, in a
            list or stacked.
        gains: One gain per latent: a number, or a curve `[T]` with one number per frame. The
            default is 1 for each. A negative gain subtracts a sound. A curve is exact if it is
            constant over the context of a frame, and a good approximation if it changes slowly from
            frame to frame.
        origin: The latent of silence of these latents' store (for a crop: `origin.at`); None
            for the raw sum.

    Returns:
        `[C, T]`, float32. For means with standard deviations the means and the variances are
        added; the variance of silence is zero: `sqrt(sum((gain_i * std_i)^2))`.

    Raises:
        ConfigError: There are no latents, their shapes differ, the number of gains or the length of
            a curve is wrong, the latents are codes, or the origin belongs to other latents.
    """
    return combine(latents, gains, origin, stacklevel=2)


def gain(latent: LatentLike, factor: Gain, *, origin: Origin | None) -> FloatArray:
    """The latent of factor * sound; the factor is a number or a curve `[T]`, see `mix`."""
    return combine([latent], [factor], origin, stacklevel=2)


def subtract(latent: LatentLike, other: LatentLike, *, origin: Origin | None) -> FloatArray:
    """The latent of a mixture without one of its sounds; see `mix`."""
    return combine([latent, other], [1.0, -1.0], origin, stacklevel=2)


def mixup(
    latent: LatentLike, other: LatentLike, weight: Gain, *, origin: Origin | None
) -> FloatArray:
    """The latent of weight * sound + (1 - weight) * other.

    Args:
        latent: `[C, T]`.
        other: A latent of the same shape.
        weight: 0 to 1, a number or a curve `[T]`.
        origin: As in `mix`. It is used for checks and for standard deviations only, because the
            weights add up to 1.

    Raises:
        ConfigError: As in `mix`, or a weight is not in 0..1.
    """
    weight = as_array(weight)
    if np.min(weight) < 0 or np.max(weight) > 1:
        raise ConfigError("The weight of mixup must be in 0..1: use mix for other gains.")
    return combine([latent, other], [weight, 1 - weight], origin, stacklevel=2)


def combine(
    given: Sequence[LatentLike] | LatentLike,
    gains: Sequence[Gain] | None,
    origin: Origin | None,
    *,
    stacklevel: int,
) -> FloatArray:
    """Implementation of `mix` and the other functions; `stacklevel` is for warnings."""
    latents: list[Latent] = [as_array(latent) for latent in given]
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
    positive = sum(bool(np.any(factor > 0)) for factor in used)
    negative = sum(bool(np.any(factor < 0)) for factor in used)
    origin.warn(
        adds=max(positive, negative) > 1,
        subtracts=min(positive, negative) > 0,
        scales=scales,
        stacklevel=stacklevel + 1,
    )
    each = np.broadcast_arrays(*factors)  # numbers and curves may stand side by side
    rest = np.float32(1) - np.sum(each, axis=0, dtype=np.float64).astype(np.float32)
    if np.any(rest != 0):
        total += rest * origin.like(total)
    if origin.deviations:
        rows = slice(-origin.deviations, None)
        variances = [  # of independent parts, which add up
            np.square(factor * latent[..., rows, :].astype(np.float32))
            for latent, factor in zip(latents, factors, strict=True)
        ]
        total[..., rows, :] = np.sqrt(np.sum(variances, axis=0))
    return total


def _factors(latents: Sequence[Latent], gains: Sequence[Gain] | None) -> list[FloatArray]:
    """Check the gains against the latents and convert them to arrays `[]` or `[T]`."""
    if not latents:
        raise ConfigError("mix needs at least one latent.")
    try:
        factors = [
            np.asarray(as_array(g), np.float32)
            for g in ([1.0] * len(latents) if gains is None else gains)
        ]
    except (TypeError, ValueError) as error:
        raise ConfigError(
            "A gain must be a number, or an array with one for each frame."
        ) from error
    if not all(np.isfinite(factor).all() for factor in factors):
        raise ConfigError("A gain is NaN, infinite or too large: use a factor such as 0.5.")
    if len(factors) != len(latents):
        raise ConfigError(
            f"{len(factors)} gains given for {len(latents)} latents: give one gain per latent."
        )
    shapes = {latent.shape for latent in latents}
    if len(shapes) > 1:
        listed = ", ".join(str(shape) for shape in sorted(shapes))
        raise ConfigError(
            f"Latents of different shapes cannot be mixed: {listed}; make them equally long with "
            "`fit` (on the command line with --length shortest or --length longest)."
        )
    for latent, factor in zip(latents, factors, strict=True):
        if latent.ndim not in (2, 3):
            raise ConfigError(
                f"An array of shape {list(latent.shape)} is not a latent: give latents [C, T], or "
                "[N, C, T] if they are overlapping chunks (stitch none)."
            )
        if factor.ndim and latent.ndim != 2:
            raise ConfigError(
                "A gain curve cannot be applied to latents that are overlapping chunks (stitch "
                "none): give one number per latent."
            )
        if factor.ndim and factor.shape != latent.shape[-1:]:
            raise ConfigError(
                f"The gain curve has shape {factor.shape} but the latent has {latent.shape[-1]} "
                "frames: give one number per frame."
            )
        if not np.issubdtype(latent.dtype, np.floating):
            raise ConfigError(
                f"Latents of type {latent.dtype} are codes, which cannot be scaled or added: use "
                "latents of type float16 or float32."
            )
    return factors
