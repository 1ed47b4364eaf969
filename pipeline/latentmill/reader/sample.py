"""What the reader hands out, and what a transform may do with it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from latentmill.errors import ConfigError
from latentmill.ops import Origin


@dataclass(frozen=True)
class Sample:
    """One training sample: a latent, which of its frames are audio, and what is known of it.

    Attributes:
        key: The item's key.
        latent: `[channels, frames]`, float32.
        mask: `[frames]`, True where a frame is the item's, False where it is padding.
        metadata: The item's own metadata, and where in the item the crop begins and how long the
            item is: `seconds_start`, `seconds_total`.
        epoch: The epoch that the sample was drawn in.
        position: Its place in that epoch; whatever is random about it follows from the two.
        origin: The latent of silence of its store, for what makes it longer.
    """

    key: str
    latent: npt.NDArray[np.float32] = field(repr=False)
    mask: npt.NDArray[np.bool_] = field(repr=False)
    metadata: Mapping[str, Any] = field(default_factory=dict)
    epoch: int = 0
    position: int = 0
    origin: Origin | None = field(default=None, repr=False)


class Transform(Protocol):
    """A change of a sample. Must be picklable, and a pure function of its arguments."""

    def __call__(self, sample: Sample, random: np.random.Generator) -> Sample:
        """Give the changed sample; `random` is the sample's own, see `sample_random`."""
        ...


def check_seed(seed: int) -> None:
    """Refuse a seed that no random numbers can be drawn from.

    Raises:
        ConfigError: It is negative.
    """
    if seed < 0:
        raise ConfigError(f"seed is {seed}: give a whole number from 0.")


def sample_random(seed: int, epoch: int, position: int) -> np.random.Generator:
    """The random numbers of one sample: a pure function of seed, epoch and position in the epoch.

    Whichever worker or rank reads the sample, and after a resume, they are the same.
    """
    return np.random.Generator(np.random.Philox(np.random.SeedSequence((seed, epoch, position))))
