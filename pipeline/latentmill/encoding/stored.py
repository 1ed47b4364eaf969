"""What readers rely on in the model, chunks and numeric mode that a store describes.

dataset.json and plan.json hold them as JSON objects with more fields than these, which depend on
the model. A store may be damaged or hostile: both are checked when they are read.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from latentmill.errors import StoreError
from latentmill.models.base import Channels, Stitch
from latentmill.models.inference.precision import Precision

_Count = Annotated[int, Field(gt=0, lt=2**31)]
_Number = Annotated[int, Field(ge=0, lt=2**31)]


class _Facts(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)


class _Model(_Facts):
    name: str
    sample_rate: _Count
    channels: _Count
    latent_channels: _Count
    hop: _Count
    scale_factor: float
    asked: str | None = None
    asked_channels: Channels | None = None
    options: dict[str, Any] = {}


class _Chunking(_Facts):
    model_config = ConfigDict(extra="forbid")
    stitch: Stitch
    samples: _Count
    step: _Count
    overlap: _Number
    skew: Annotated[int, Field(gt=-(2**31), lt=2**31)] = 0

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.step > self.samples:
            raise ValueError("a gap between chunks")
        return self


class _Numeric(_Facts):
    precision: Precision


_KINDS: dict[str, type[_Facts]] = {"model": _Model, "chunking": _Chunking, "numeric": _Numeric}


def parse_json(text: str | bytes) -> Any:
    """Parse JSON of a store; of JSON that is nested too deep, Python raises a RecursionError.

    Raises:
        ValueError: It is not valid, or nested too deep.
    """
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("nested too deep") from error


def refuse_damaged(document: Mapping[str, Any], path: str, *names: str) -> None:
    """`check_facts` of plan.json.

    Raises:
        StoreError: The sections are not what a run writes.
    """
    try:
        check_facts(document, *names)
    except ValueError as error:
        raise StoreError(f"{path} is damaged ({error}): restore it from a copy.") from error


def check_facts(document: Mapping[str, Any], *names: str) -> None:
    """Check some of a fingerprint document's sections: `model`, `chunking`, `numeric`.

    Raises:
        ValueError: One lacks what readers need, or a value that no run writes.
    """
    for name in names:
        try:
            _KINDS[name].model_validate(document.get(name))
        except ValidationError as error:
            place = ".".join(map(str, (name, *error.errors()[0]["loc"])))
            raise ValueError(f"{place} is not what a run writes") from error
