"""Changes of one training sample: louder, faded, drawn from its posterior.

Each is a picklable value and a pure function of the sample and its random numbers, so that a
sample is the same on every worker and after every resume; see `sample_random`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from latentmill.errors import ConfigError
from latentmill.ops import Origin, fade, gain
from latentmill.reader.sample import Sample

Decibels = tuple[float, float]


def random_factor(decibels: Decibels, random: np.random.Generator) -> float:
    """A random amplitude factor, evenly distributed in decibels between the two bounds."""
    return float(10 ** (random.uniform(*decibels) / 20))


def check_decibels(decibels: Decibels) -> None:
    """Refuse a range that is none.

    Raises:
        ConfigError: Its bounds are not finite, or in the wrong order.
    """
    lowest, highest = decibels
    if not (np.isfinite(lowest) and np.isfinite(highest) and lowest <= highest):
        raise ConfigError(
            f"A range of decibels goes from low to high, not from {lowest} to {highest}."
        )


@dataclass(frozen=True)
class RandomGain:
    """Makes a sample louder or softer by a random gain.

    Attributes:
        decibels: The lowest and the highest gain, dB.
    """

    decibels: Decibels = (-6.0, 6.0)

    def __post_init__(self) -> None:
        check_decibels(self.decibels)

    def __call__(self, sample: Sample, random: np.random.Generator) -> Sample:
        """The sample, louder or softer."""
        factor = random_factor(self.decibels, random)
        return replace(sample, latents=gain(sample.latents, factor, origin=_origin(sample)))


@dataclass(frozen=True)
class RandomFade:
    """Fades a sample in and out over random lengths.

    Attributes:
        frames: The longest fade at each end; at most half the sample is used.
    """

    frames: int

    def __post_init__(self) -> None:
        if self.frames < 0:
            raise ConfigError(f"RandomFade needs a number of frames, not {self.frames}.")

    def __call__(self, sample: Sample, random: np.random.Generator) -> Sample:
        """The sample between two fades."""
        longest = min(self.frames, sample.latents.shape[1] // 2)
        fade_in, fade_out = random.integers(0, longest + 1, 2).tolist()
        return replace(
            sample, latents=fade(sample.latents, fade_in, fade_out, origin=_origin(sample))
        )


@dataclass(frozen=True)
class DrawFromPosterior:
    """Draws a latent from a stored posterior, mean + std * noise; half the channels stay."""

    def __call__(self, sample: Sample, random: np.random.Generator) -> Sample:
        """The sample with a drawn latent, which silence continues by the mean of its own."""
        origin = _origin(sample)
        rows = origin.deviations
        if not rows:
            raise ConfigError(
                "The latents have no standard deviations to draw from: leave DrawFromPosterior out."
            )
        means, deviations = sample.latents[:-rows], sample.latents[-rows:]
        noise = random.standard_normal(means.shape, np.float32)
        silence = replace(origin, frames=origin.frames[:-rows], deviations=0)
        return replace(sample, latents=means + deviations * noise, origin=silence)


def _origin(sample: Sample) -> Origin:
    if sample.origin is None:
        raise ConfigError(f"Sample {sample.key} does not know its store's origin: keep `origin`.")
    return sample.origin
