"""Transforms of the fields of a sample: conditioning dropout, and fields at the latents' rate.

Like all transforms, they are picklable and pure functions of the sample and its random generator.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeVar, cast

import numpy as np

from latentmill.errors import ConfigError
from latentmill.reader.field_values import FieldValue, Values

S = TypeVar("S")


@dataclass(frozen=True)
class Drop:
    """Conditioning dropout: randomly replaces a field by its value for an empty input.

    The empty input is an empty text or silence; the store of the field has its value. Tokens and
    vectors of stores without it become zeros.

    Attributes:
        field: Name of the field.
        probability: Probability that the field of a sample is replaced, 0 to 1.
        zeros: Whether to use zeros in any case; the mask then stays as it is.
    """

    field: str
    probability: float
    zeros: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.probability <= 1:
            raise ConfigError(
                f"Drop needs a probability from 0 to 1 for {self.field!r}, not {self.probability}."
            )

    def __call__(self, sample: S, random: np.random.Generator) -> S:
        value = field_of(sample, self.field)
        if random.random() >= self.probability:
            return sample
        return with_field(sample, self.field, self._empty(value))

    def _empty(self, value: FieldValue) -> FieldValue:
        if self.zeros or (value.empty is None and value.origin is None):
            return replace(value, values=np.zeros_like(value.values))
        if value.origin is not None:
            silence = value.origin.like(value.values).astype(value.values.dtype)
            return replace(value, values=silence)
        assert value.empty is not None
        mask = np.ones(value.empty.shape[: value.mask.ndim], np.bool_)
        return replace(value, values=value.empty, mask=mask)


@dataclass(frozen=True)
class Align:
    """Resamples a field to the frames of the latents: a condition for each latent frame.

    The result is `[D, T]` with the mask of the nearest frames of the field.

    Attributes:
        field: Name of a field with a rate.
        how: `nearest` takes the frame whose time includes the middle of the latent frame; `linear`
            interpolates between the middles of two frames, and needs numbers that are not codes.
    """

    field: str
    how: Literal["nearest", "linear"] = "nearest"

    def __post_init__(self) -> None:
        if self.how not in ("nearest", "linear"):
            raise ConfigError(f"Align cannot resample {self.how!r}: use 'nearest' or 'linear'.")

    def __call__(self, sample: S, random: np.random.Generator) -> S:
        """Resample the field; `random` is not used."""
        value = field_of(sample, self.field)
        if not value.form.timed:
            raise ConfigError(
                f"field {self.field!r} has no rate, because its kind is {value.form.kind}: remove "
                "Align."
            )
        if self.how == "linear" and value.form.kind == "codes":
            raise ConfigError(
                f"field {self.field!r} has codes, which cannot be interpolated: use "
                f"Align({self.field!r}, 'nearest')."
            )
        mask = _part(sample, "mask")
        if mask is None:
            raise ConfigError(
                "Align needs the mask of the latents, but the task's results have none: return "
                "`mask` from it."
            )
        frames = len(mask)
        # The middles of the latents' frames, in frames of the field.
        middles = value.shift + (np.arange(frames) + 0.5) * value.rate
        last = value.values.shape[1] - 1
        nearest = np.clip(np.floor(middles).astype(np.int64), 0, last)
        values = value.time_major[nearest]
        if self.how == "linear":
            values = _between(value.time_major, middles - 0.5)
        return with_field(
            sample,
            self.field,
            replace(value, values=values.T, mask=value.mask[nearest], rate=1.0, shift=0.0),
        )


def _between(values: Values, at: np.ndarray[Any, np.dtype[np.float64]]) -> Values:
    """Linear interpolation of `[n, D]` at positions; beyond the ends the first and last values."""
    at = np.clip(at, 0, len(values) - 1)
    before = np.floor(at).astype(np.int64)
    after = np.minimum(before + 1, len(values) - 1)
    share = (at - before).astype(np.float32)[:, None]
    result: Values = values[before] + (values[after] - values[before]) * share
    return result


def _part(sample: object, name: str) -> Any:
    """A part of a sample or of a stem task's result, which may be a mapping; None without it."""
    return sample.get(name) if isinstance(sample, Mapping) else getattr(sample, name, None)


def field_of(sample: object, name: str) -> FieldValue:
    """A field of a sample; ConfigError if the sample does not have it."""
    fields = _part(sample, "fields")
    if not isinstance(fields, Mapping) or name not in fields:
        raise ConfigError(
            f"samples have no field {name!r}: read it with fields=[{name!r}], or remove the "
            "transform."
        )
    value: FieldValue = fields[name]
    return value


def with_field(sample: S, name: str, value: FieldValue) -> S:
    """A copy of a sample, or of a stem task's result, with another value of a field."""
    changed: Any = sample
    fields = {**_part(sample, "fields"), name: value}
    if isinstance(changed, Mapping):
        return cast("S", {**changed, "fields": fields})
    if hasattr(changed, "_replace"):
        return cast("S", changed._replace(fields=fields))
    return cast("S", replace(changed, fields=fields))
