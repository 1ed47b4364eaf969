"""The augmentation that makes an autoencoder linear, for any training loop.

    linearity = LinearityAugmentation(steps=100_000, seed=0)
    for step, audio in enumerate(loader):
        batch = linearity(audio, step)
        latents = batch.latents(encoder(batch.inputs))
        loss = distance(decoder(latents), batch.targets)

The encoder encodes sounds x_i. The decoder gets their latents z_i and, for mixtures of the sounds,
the same mixtures of the latents; all are multiplied by random gains, and so are the sounds that the
decoder must return. Architecture and loss stay as they are. After B. Torres and others, "Learning
Linearity in Audio Consistency Autoencoders via Implicit Regularization", arXiv 2510.23530, and the
README of its package linear-cae.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from latentmill.errors import ConfigError

Numbers = npt.NDArray[np.float64]
Mixing = Literal["weighted", "sum", "none"]
Annealing = Literal["none", "linear", "cosine"]

HOLD, END = 0.2, 0.9  # of the steps: where cosine annealing begins and ends


class LinearitySettings(BaseModel):
    """What is mixed and scaled. The defaults are those of the authors' model lin-cae."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    mixing: Mixing = Field(
        "weighted",
        description="Mixtures of a sound x and its neighbour y in the batch: weighted "
        "(w x + (1 - w) y, w from 0.5 to 1), sum (x + y) or none.",
    )
    gain_probability: float = Field(
        0.8, ge=0, le=1, description="Share of the targets that get a random gain."
    )
    max_gain: float = Field(
        3.0, ge=1, description="Gains are drawn uniformly from 0 to this factor."
    )
    silence_below: float = Field(
        0.05, ge=0, le=1, description="Smaller gains become 0, which is silence."
    )
    annealing: Annealing = Field(
        "cosine",
        description="How the range of gains shrinks to 1: none, linear (over all steps) or cosine "
        "(from 20 % to 90 % of the steps).",
    )
    origin: bool = Field(
        False, description="Subtract the latent of silence before latents are mixed and scaled."
    )
    noise_at_gain: bool = Field(
        True,
        description="Consistency autoencoders: multiply the noise of a target by its gain; false "
        "adds it unchanged, as the README of linear-cae does.",
    )


@dataclass(frozen=True)
class LinearityBatch:
    """One step's input, mixtures and gains. N is the number of targets: B, or 2 B with mixtures.

    Attributes:
        inputs: What to encode: the sounds `[B, C, T]`, and one of silence if the origin is used.
        targets: What the decoder must return `[N, C, T]`: the sounds, then their mixtures, at their
            gains.
        gains: Gain of each target `[N]`.
        weights: The sounds in each target before its gain `[N, B]`; a row of a sound is one 1, and
            of a mixture two weights.
        origin: Whether the last of the inputs is silence.
    """

    inputs: Tensor
    targets: Tensor
    gains: Tensor
    weights: Tensor
    origin: bool
    noise_at_gain: bool = field(default=True, repr=False)

    def latents(self, encoded: Tensor) -> Tensor:
        """The latents `[N, ...]` of the targets, from the latents of `inputs`.

        With w the weights of a target and a its gain this is a sum_i(w_i z_i). With the origin
        c = E(0) it is c + a sum_i(w_i (z_i - c)): z_op of the linearity card for the gains a w_i.
        """
        if len(encoded) != len(self.inputs):
            raise ConfigError(
                f"expected the latents of all {len(self.inputs)} inputs of the batch, got "
                f"{len(encoded)}: encode batch.inputs."
            )
        factors = self.gains[:, None] * self.weights
        if not self.origin:
            return _combine(factors, encoded)
        silence = encoded[-1:]
        return silence + _combine(factors, encoded[:-1] - silence)

    def noise(self, noise: Tensor) -> Tensor:
        """The noise `[N, ...]` for the targets of a consistency autoencoder.

        The decoder gets a target and this noise times sigma. A target with gain a gets a times the
        noise, so that the latent, the target and its noise are scaled alike; without
        `noise_at_gain` the noise is returned unchanged.
        """
        if not self.noise_at_gain:
            return noise
        return noise * self.gains.to(noise.dtype).reshape(-1, *[1] * (noise.ndim - 1))


class LinearityAugmentation:
    """Mixes and scales batches. Its random numbers depend only on the seed, the step and the rank.

    Args:
        settings: What is mixed and scaled; default: the authors' recipe.
        steps: Number of training steps, for annealing.
        seed: Any whole number.
        rank: Number of the process in distributed training.
    """

    def __init__(
        self,
        settings: LinearitySettings | None = None,
        *,
        steps: int,
        seed: int = 0,
        rank: int = 0,
    ) -> None:
        self.settings = settings or LinearitySettings()
        self._steps, self._seed, self._rank = steps, seed, rank

    def __call__(self, audio: Tensor, step: int) -> LinearityBatch:
        """Augment audio `[B, C, T]` of a training step.

        Raises ConfigError if there is only one sound to mix.
        """
        settings, count = self.settings, len(audio)
        draws = random_numbers(self._seed, step, self._rank, 5 * count).reshape(5, count)
        weights = torch.eye(count, device=audio.device)
        targets = audio
        if settings.mixing != "none":
            if count < 2:
                raise ConfigError(
                    "mixtures need at least 2 sounds per batch: use a larger batch, or mixing none."
                )
            weighted = settings.mixing == "weighted"
            first = torch.from_numpy(0.5 + 0.5 * draws[0] if weighted else np.ones(count))
            first = first.float().to(audio.device)
            second = 1 - first if weighted else first
            # The neighbour is that of torch.roll(audio, 1), as in the README of linear-cae.
            mixtures = torch.diag(first) + torch.diag(second).roll(-1, dims=1)
            weights = torch.cat((weights, mixtures))
            targets = torch.cat((audio, _combine(mixtures, audio)))
        gains = self._gains(draws[1:], step)[: len(targets)].to(audio.device)
        gains = capped(gains, targets)
        silence = [torch.zeros_like(audio[:1])] if settings.origin else []
        return LinearityBatch(
            inputs=torch.cat([audio, *silence]),
            targets=targets * gains[:, None, None],
            gains=gains,
            weights=weights,
            origin=settings.origin,
            noise_at_gain=settings.noise_at_gain,
        )

    def _gains(self, draws: Numbers, step: int) -> Tensor:
        """Gains `[2 B]` from 4 B random numbers: whether a target gets one, and which."""
        settings = self.settings
        chosen, drawn = draws.reshape(2, -1)
        low, high = gain_range(settings.max_gain, settings.annealing, step, self._steps)
        gains = low + (high - low) * drawn
        gains[gains < settings.silence_below] = 0.0
        gains[chosen >= settings.gain_probability] = 1.0
        return torch.from_numpy(gains).float()


def plain_batch(audio: Tensor) -> LinearityBatch:
    """A batch without mixtures and gains, for training without linearity."""
    eye = torch.eye(len(audio), device=audio.device)
    gains = torch.ones(len(audio), device=audio.device)
    return LinearityBatch(audio, audio, gains, eye, origin=False)


def gain_range(max_gain: float, annealing: Annealing, step: int, steps: int) -> tuple[float, float]:
    """The smallest and the largest gain of a step: from (0, max_gain) to (1, 1).

    The width w of the range falls from 1 to 0; the range is 1 - w to 1 + (max_gain - 1) w.
    `linear`: over all steps. `cosine`, as in the authors' training of lin-cae: w = 1 for 20 % of
    the steps, then (1 + cos(pi u)) / 2, where u rises from 0 to 1 at 90 % of the steps.
    """
    progress = min(1.0, step / max(1, steps))
    width = 1.0
    if annealing == "linear":
        width = 1 - progress
    elif annealing == "cosine":
        reached = min(1.0, max(0.0, (progress - HOLD) / (END - HOLD)))
        width = (1 + math.cos(math.pi * reached)) / 2
    return 1 - width, 1 + (max_gain - 1) * width


def capped(gains: Tensor, sounds: Tensor) -> Tensor:
    """Gains `[N]`, at most 1 / max|x| for each sound x of `[N, C, T]`, so that none clips."""
    peaks = sounds.abs().flatten(1).amax(dim=1).clamp(min=1e-9)
    return torch.minimum(gains, 1 / peaks)


def random_numbers(seed: int, step: int, rank: int, count: int, stream: int = 0) -> Numbers:
    """Uniformly distributed numbers in [0, 1), a pure function of the arguments (Philox)."""
    key = np.array([seed % 2**64, (stream << 32) + rank], dtype=np.uint64)
    generator = np.random.Generator(np.random.Philox(key=key, counter=step << 128))
    return generator.random(count)


def _combine(weights: Tensor, values: Tensor) -> Tensor:
    """The sums `[N, ...]` of values `[B, ...]` by weights `[N, B]`, never in half precision."""
    with torch.autocast(values.device.type, enabled=False):
        values = values.to(torch.promote_types(values.dtype, torch.float32))
        return torch.einsum("nb,b...->n...", weights.to(values.dtype), values)
