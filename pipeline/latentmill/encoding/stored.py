"""Checks the description of model, chunking and numeric mode in a store's JSON files.

dataset.json and plan.json have these as JSON objects with additional fields that depend on the
model. A store may be damaged or hostile, so the fields that readers use are checked when read.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from latentmill.encoding.fingerprint import rows_difference
from latentmill.errors import StoreError
from latentmill.models.base import Channels, Stitch, has_deviations
from latentmill.models.inference.precision import Precision

_Count = Annotated[int, Field(gt=0, lt=2**31)]
_Number = Annotated[int, Field(ge=0, lt=2**31)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)


class _Model(_Section):
    name: str
    sample_rate: _Count
    channels: _Count
    latent_channels: _Count
    hop: _Count
    scale_factor: float
    asked: str | None = None
    asked_channels: Channels | None = None
    options: dict[str, Any] = {}
    provenance: dict[str, Any] = {}


class _Chunking(_Section):
    model_config = ConfigDict(extra="forbid")
    stitch: Stitch
    samples: _Count
    step: _Count
    overlap: _Number
    skew: Annotated[int, Field(gt=-(2**31), lt=2**31)] = 0

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.step > self.samples:
            raise ValueError("the step is larger than a chunk")
        return self


class _Numeric(_Section):
    precision: Precision


_SECTIONS: dict[str, type[_Section]] = {"model": _Model, "chunking": _Chunking, "numeric": _Numeric}


def parse_json(text: str | bytes) -> Any:
    """Parse JSON of a store. Raises ValueError if it is invalid or nested too deeply."""
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def refuse_damaged(document: Mapping[str, Any], path: str, *names: str) -> None:
    """Raise StoreError if sections of a fingerprint document in the file `path` are invalid."""
    try:
        check_facts(document, *names)
    except ValueError as error:
        raise StoreError(f"{path} is damaged ({error}): restore it from a backup.") from error


def deviations_of(model: Mapping[str, Any]) -> int:
    """Number of a latent's rows, at the end, that are standard deviations of the others."""
    channels: int = model["latent_channels"]
    return channels // 2 if has_deviations(model) else 0


def refuse_earlier_rows(model: Mapping[str, Any], url: str) -> None:
    """Raise StoreError if the rows of latents are not in the order that readers expect."""
    if reason := rows_difference(model):
        raise StoreError(f"Store {url} {reason}")


def check_facts(document: Mapping[str, Any], *names: str) -> None:
    """Raise ValueError if a section (`model`, `chunking`, `numeric`) is missing or invalid."""
    for name in names:
        try:
            _SECTIONS[name].model_validate(document.get(name))
        except ValidationError as error:
            place = ".".join(map(str, (name, *error.errors()[0]["loc"])))
            raise ValueError(f"{place} is missing or invalid") from error
