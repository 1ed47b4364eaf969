"""How linear an encoder is: does the latent follow when sounds are made louder, or added?

With E the encoder, c = E(silence of the same length) and z_op = sum(a_i E(x_i)) +
(1 - sum(a_i)) c, the formulas of B. Torres and others, "Learning Linearity in Audio Consistency
Autoencoders via Implicit Regularization", arXiv 2510.23530, with the origin c beside their raw
form, which leaves it out:

    relL2(p, t)  = ||p - t|| / ||t||
    homogeneity  = relL2(E(a x), a E(x) + (1 - a) c)
    additivity   = relL2(sum(E(x_i)) - (K - 1) c, E(sum(x_i)))    of K sounds

The norm of t is taken with the origin removed, ||t - c||: a constant in every latent, which says
nothing about a sound, would make every error small. The same with the norm of t as it is stands
beside it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from latentmill.errors import ModelError
from latentmill.models.base import Autoencoder, ModelSpec

GAINS = (0.25, 0.5, 0.75, 1.1)


@dataclass(frozen=True)
class Deviation:
    """How far a latent is from what arithmetic gives: 0 is exact, 1 as far as no answer at all.

    Attributes:
        with_origin: Error of the formula with the latent of silence, over ||t - c||.
        raw: Error of the formula without it, over ||t - c||.
        raw_norm: Error of the formula with the latent of silence, over ||t||.
    """

    with_origin: float
    raw: float
    raw_norm: float


def relative_l2(given: Tensor, target: Tensor, reference: Tensor | None = None) -> float:
    """||given - target|| / ||reference|| over all elements, in float64; 0 where both are zero.

    Without a reference it is the target.
    """
    difference = float((given.double() - target.double()).norm())
    size = float((target if reference is None else reference).double().norm())
    if size == 0:
        return 0.0 if difference == 0 else math.inf
    return difference / size


def combination(latents: Sequence[Tensor], gains: Sequence[float], origin: Tensor | None) -> Tensor:
    """z_op, the latent of sum(gain_i * sound_i), of latents of one shape, in float64.

    Args:
        latents: Latents, such as `[D, Z]`.
        gains: One gain a latent.
        origin: The latent of silence, of the same shape; None for the raw form.
    """
    total = torch.zeros_like(latents[0], dtype=torch.float64)
    for latent, gain in zip(latents, gains, strict=True):
        total += gain * latent.double()
    return total if origin is None else total + (1 - sum(gains)) * origin.double()


def homogeneity(
    model: Autoencoder, audio: Tensor, gains: Sequence[float] = GAINS
) -> dict[float, Deviation]:
    """Compare the latents of louder and softer sounds with scaled latents.

    Args:
        model: The model.
        audio: A sound `[C, T]`, float32; zeros fill it up to a length that the model takes.
        gains: Factors of its amplitude.

    Returns:
        The deviation of E(a x) from z_op, by gain.

    Raises:
        ModelError: The latents are codes, for which there is no arithmetic.
    """
    latent, origin = _encode(model, audio), _encode(model, torch.zeros_like(audio))
    deviations = {}
    for gain in gains:
        louder = _encode(model, gain * audio)
        target = combination([latent], [gain], origin)
        deviations[gain] = Deviation(
            with_origin=relative_l2(louder, target, target - origin),
            raw=relative_l2(louder, combination([latent], [gain], None), target - origin),
            raw_norm=relative_l2(louder, target),
        )
    return deviations


def additivity(model: Autoencoder, sounds: Sequence[Tensor]) -> Deviation:
    """Compare the sum of latents with the latent of the sum.

    Args:
        model: The model.
        sounds: Sounds `[C, T]` of one shape, float32; of the stems of a song this is the
            metric called composition.

    Returns:
        The deviation of z_op, all gains 1, from E(sum(x_i)).

    Raises:
        ModelError: The latents are codes, for which there is no arithmetic.
    """
    latents = [_encode(model, sound) for sound in sounds]
    origin = _encode(model, torch.zeros_like(sounds[0]))
    together = _encode(model, torch.stack(list(sounds)).sum(dim=0))
    ones = [1.0] * len(latents)
    given = combination(latents, ones, origin)
    return Deviation(
        with_origin=relative_l2(given, together, together - origin),
        raw=relative_l2(combination(latents, ones, None), together, together - origin),
        raw_norm=relative_l2(given, together),
    )


def check_linear(spec: ModelSpec) -> None:
    """Refuse a model whose latents no arithmetic holds for.

    Raises:
        ModelError: They are codes.
    """
    if spec.codebook_size is not None:
        raise ModelError(
            f"Model {spec.name} gives codes, which cannot be scaled or added: leave out the "
            "option output=codes."
        )


def _encode(model: Autoencoder, audio: Tensor) -> Tensor:
    """The latent `[D, Z]` of one sound `[C, T]`, on the CPU."""
    check_linear(model.spec)
    missing = model.spec.padded(audio.shape[-1]) - audio.shape[-1]
    return model.encode(F.pad(audio, (0, missing))[None])[0].cpu()
