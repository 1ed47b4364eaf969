"""Random transforms of one training sample: gain, fades, drawing from the posterior.

Each is picklable and a pure function of the sample and its random generator (`sample_random`), so
a sample is the same in every worker and after resuming.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from latentmill.errors import ConfigError
from latentmill.ops import Origin, fade, gain
from latentmill.reader.sample import Sample, check_has_origin

Decibels = tuple[float, float]


def random_factor(decibels: Decibels, random: np.random.Generator) -> float:
    """A random amplitude factor, uniform in decibels between the two bounds."""
    return float(10 ** (random.uniform(*decibels) / 20))


def check_decibels(decibels: Decibels) -> None:
    """Raise ConfigError unless there are two finite bounds in the right order."""
    try:
        lowest, highest = decibels
        valid = bool(np.isfinite(lowest) and np.isfinite(highest) and lowest <= highest)
    except (TypeError, ValueError):  # not two numbers
        valid = False
    if not valid:
        raise ConfigError(
            f"invalid range of decibels {decibels!r}: use two finite bounds, from low to high, "
            "such as (-6, 6)."
        )


@dataclass(frozen=True)
class RandomGain:
    """Applies a random gain.

    Attributes:
        decibels: The lowest and the highest gain, in dB.
    """

    decibels: Decibels = (-6.0, 6.0)

    def __post_init__(self) -> None:
        check_decibels(self.decibels)

    def __call__(self, sample: Sample, random: np.random.Generator) -> Sample:
        check_has_origin(sample, self, "use StemDataset(..., gains=(-6, 6))")
        factor = random_factor(self.decibels, random)
        return replace(sample, latents=gain(sample.latents, factor, origin=_origin(sample)))


@dataclass(frozen=True)
class RandomFade:
    """Fades a sample in and out over random lengths.

    Attributes:
        frames: Maximum length of each fade, in frames; a fade is at most half the sample long.
    """

    frames: int

    def __post_init__(self) -> None:
        if self.frames < 0:
            raise ConfigError(f"RandomFade needs a number of frames from 0, not {self.frames}.")

    def __call__(self, sample: Sample, random: np.random.Generator) -> Sample:
        check_has_origin(sample, self, "use lm.fade in a task of your own")
        longest = min(self.frames, sample.latents.shape[1] // 2)
        fade_in, fade_out = random.integers(0, longest + 1, 2).tolist()
        return replace(
            sample, latents=fade(sample.latents, fade_in, fade_out, origin=_origin(sample))
        )


@dataclass(frozen=True)
class DrawFromPosterior:
    """Draws a latent from a stored posterior, mean + std * noise, which halves the channels.

    The noise is another one in each epoch, and depends on nothing but seed, epoch and position.
    """

    def __call__(self, sample: Sample, random: np.random.Generator) -> Sample:
        """Draw the latent; silence that pads it is the mean of the origin, without noise."""
        check_has_origin(sample, self, "draw the stems in a task of your own")
        origin = _origin(sample)
        rows = origin.deviations
        if not rows:
            raise ConfigError(
                "the latents have no standard deviations to draw from: encode with --model-option "
                "posterior=mean+std (docs/models.md), or remove DrawFromPosterior."
            )
        means, deviations = sample.latents[:-rows], sample.latents[-rows:]
        noise = random.standard_normal(means.shape, np.float32) * sample.mask
        silence = replace(origin, frames=origin.frames[:-rows], deviations=0)
        return replace(sample, latents=means + deviations * noise, origin=silence)


def _origin(sample: Sample) -> Origin:
    if sample.origin is None:
        raise ConfigError(f"sample {sample.key} has no origin: keep `origin` in transforms.")
    return sample.origin
