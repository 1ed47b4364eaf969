"""A training sample, and what a transform may do with it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from latentmill.errors import ConfigError
from latentmill.ops import Origin
from latentmill.record import FloatArray


@dataclass(frozen=True)
class Sample:
    """One training sample: a latent, which of its frames are audio, and what is known of it.

    Attributes:
        key: The item's key.
        latents: `[channels, frames]`, float32.
        mask: `[frames]`, True where a frame is the item's, False where it is padding.
        metadata: The item's own metadata, and where in the item the crop begins and how long the
            item is: `seconds_start`, `seconds_total`.
        epoch: The epoch that the sample was drawn in.
        position: Its place in that epoch; whatever is random about it follows from the two.
        origin: The latent of silence of its store, for what makes it longer.
    """

    key: str
    latents: FloatArray = field(repr=False)
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


def whole_number(name: str, value: object, *, least: int) -> int:
    """The value of an option that must be a whole number, as a plain int.

    Raises:
        ConfigError: It is not a whole number, or below `least`.
    """
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        hint = f": write {int(value)}" if isinstance(value, float) and value.is_integer() else ""
        raise ConfigError(f"{name} must be a whole number, not {value!r}{hint}.")
    if value < least:
        raise ConfigError(f"{name} must be at least {least}, not {value}.")
    return int(value)


def sample_random(seed: int, epoch: int, position: int) -> np.random.Generator:
    """The random numbers of one sample: a pure function of seed, epoch and position in the epoch.

    Whichever worker or rank reads the sample, and after a resume, they are the same.
    """
    return np.random.Generator(np.random.Philox(np.random.SeedSequence((seed, epoch, position))))
