"""Training samples, the transform protocol, and the random numbers of a sample."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from latentmill.encoding.stored import parse_json
from latentmill.errors import ConfigError, StorageError
from latentmill.ops import Origin
from latentmill.reader.field_values import FieldValue
from latentmill.record import FloatArray


class StoredMetadata(NamedTuple):
    """A sample's metadata as it is stored.

    Attributes:
        own: The item's own metadata as JSON.
        seconds_start: Start of the crop in its item.
        seconds_total: Duration of the item.
    """

    own: str
    seconds_start: float
    seconds_total: float

    def parsed(self) -> dict[str, Any]:
        """The metadata of a `Sample`. Raises StorageError if it is not a JSON object."""
        try:
            metadata: dict[str, Any] = {} if self.own == "{}" else parse_json(self.own)
            metadata["seconds_start"] = self.seconds_start
            metadata["seconds_total"] = self.seconds_total
        except (ValueError, TypeError) as error:
            raise StorageError(
                "the metadata of a record is not a valid JSON object: run `latentmill verify "
                "STORE` to find its shard."
            ) from error
        return metadata


@dataclass(frozen=True)
class Sample:
    """One training sample: a latent, its mask and its metadata.

    Attributes:
        key: The item's key.
        latents: `[channels, frames]`, float32.
        mask: `[frames]`, True for frames of the item, False for padding.
        metadata: The item's own metadata, `seconds_start` (start of the crop in the item) and
            `seconds_total` (duration of the item). It is parsed when it is first read, which
            raises StorageError if it is damaged.
        epoch: The epoch that the sample was drawn in.
        position: Its position in that epoch. Crop and transforms depend only on seed, epoch and
            position.
        origin: The store's latent of silence, which pads the sample.
        fields: The store's fields that were asked for, by name.
    """

    key: str
    latents: FloatArray = field(repr=False)
    mask: npt.NDArray[np.bool_] = field(repr=False)
    metadata: Mapping[str, Any] = field(default_factory=dict)
    epoch: int = 0
    position: int = 0
    origin: Origin | None = field(default=None, repr=False)
    fields: Mapping[str, FieldValue] = field(default_factory=dict)

    @classmethod
    def unparsed(cls, stored: StoredMetadata, **values: Any) -> Sample:
        """A sample whose `metadata` is parsed when it is first read; `values` are all others."""
        sample = object.__new__(cls)  # the constructor sets frozen attributes one by one
        vars(sample).update(values, _stored=stored)
        return sample

    if not TYPE_CHECKING:  # a type checker must not take any name for an attribute

        def __getattr__(self, name: str) -> Any:  # called for what an instance does not have
            if name != "metadata" or "_stored" not in vars(self):
                raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
            return vars(self).setdefault(name, self._stored.parsed())


class Transform(Protocol):
    """Changes a sample. A transform must be picklable and a pure function of its arguments."""

    def __call__(self, sample: Sample, random: np.random.Generator) -> Sample:
        """Return the changed sample. `random` comes from `sample_random`."""
        ...


def check_has_origin(sample: object, transform: object, instead: str) -> None:
    """Raise ConfigError if a transform of latents gets a stem task's result without an origin."""
    if not hasattr(sample, "origin"):
        raise ConfigError(
            f"{type(transform).__name__} changes samples with `latents` and `origin`, but got a "
            f"{type(sample).__name__}: for results of a stem task, {instead}."
        )


def whole_number(name: str, value: object, *, least: int) -> int:
    """Return `value` as an int; ConfigError if it is not a whole number or below `least`."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        hint = f": write {int(value)}" if isinstance(value, float) and value.is_integer() else ""
        raise ConfigError(f"{name} must be a whole number, not {value!r}{hint}.")
    if value < least:
        raise ConfigError(f"{name} must be at least {least}, not {value}.")
    return int(value)


def checked_transforms(transforms: Iterable[Any]) -> tuple[Any, ...]:
    """The transforms as a tuple; ConfigError unless they are a list of callables."""
    several = isinstance(transforms, Iterable)
    if callable(transforms) and not several:
        raise ConfigError(f"transforms must be a list: write transforms=[{transforms!r}].")
    checked = tuple(transforms) if several else (transforms,)
    for one in checked:
        if not callable(one):
            raise ConfigError(
                f"{one!r} is not a transform: use an object such as lm.Drop(...), or a function "
                "of a sample and a random generator."
            )
    return checked


def sample_random(seed: int, epoch: int, position: int) -> np.random.Generator:
    """Random generator of one sample: a pure function of seed, epoch and position in the epoch.

    Every worker and rank gets the same numbers for it, also after resuming.
    """
    return np.random.Generator(np.random.Philox(np.random.SeedSequence((seed, epoch, position))))
