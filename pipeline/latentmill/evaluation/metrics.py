"""Metrics of an encoder's linearity: homogeneity (scaled sounds) and additivity (added sounds).

With E the encoder, c = E(silence of the same length) and z_op = sum(a_i E(x_i)) +
(1 - sum(a_i)) c, these are the formulas of B. Torres and others, "Learning Linearity in Audio
Consistency Autoencoders via Implicit Regularization", arXiv 2510.23530, with the origin c and in
the raw form, without it:

    relL2(p, t)  = ||p - t|| / ||t||
    homogeneity  = relL2(E(a x), a E(x) + (1 - a) c)
    additivity   = relL2(sum(E(x_i)) - (K - 1) c, E(sum(x_i)))    of K sounds

Errors are divided by ||t - c||, the norm without the origin, because a constant in every latent
would make every error small. Errors divided by ||t|| are reported too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from latentmill.errors import ModelError
from latentmill.models.base import Autoencoder

GAINS = (0.25, 0.5, 0.75, 1.1)


@dataclass(frozen=True)
class Deviation:
    """Relative error of latent arithmetic: 0 is exact, 1 is the error of the latent of silence.

    Attributes:
        with_origin: Error of the formula with the latent of silence, over ||t - c||.
        raw: Error of the formula without the latent of silence, over ||t - c||.
        raw_norm: Error of the formula with the latent of silence, over ||t||.
    """

    with_origin: float
    raw: float
    raw_norm: float


def relative_l2(given: Tensor, target: Tensor, reference: Tensor | None = None) -> float:
    """||given - target|| / ||reference|| over all elements, in float64; 0 if both are zero.

    The default reference is the target.
    """
    difference = float((given.double() - target.double()).norm())
    size = float((target if reference is None else reference).double().norm())
    if size == 0:
        return 0.0 if difference == 0 else math.inf
    return difference / size


def combination(latents: Sequence[Tensor], gains: Sequence[float], origin: Tensor | None) -> Tensor:
    """z_op, the latent of sum(gain_i * sound_i), in float64; without an origin in the raw form."""
    total = torch.zeros_like(latents[0], dtype=torch.float64)
    for latent, gain in zip(latents, gains, strict=True):
        total += gain * latent.double()
    return total if origin is None else total + (1 - sum(gains)) * origin.double()


def homogeneity(
    model: Autoencoder, audio: Tensor, gains: Sequence[float] = GAINS
) -> dict[float, Deviation]:
    """Deviation of E(a x) from z_op for a sound x `[C, T]`, by gain a."""
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
    """Deviation of z_op, with all gains 1, from E(sum(x_i)) for sounds x_i `[C, T]`.

    For the stems of a song the metric is also called composition.
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


def _encode(model: Autoencoder, audio: Tensor) -> Tensor:
    """The latent `[D, Z]` of one sound `[C, T]`, padded with zeros, on the CPU."""
    spec = model.spec
    if spec.codebook_size is not None:
        raise ModelError(
            f"Model {spec.name} encodes to codes, which cannot be scaled or added: leave out the "
            "option output=codes."
        )
    missing = spec.padded(audio.shape[-1]) - audio.shape[-1]
    return model.encode(F.pad(audio, (0, missing))[None])[0].cpu()
