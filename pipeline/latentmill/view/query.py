"""What a request asks for, checked: a search over the records, a mix of records."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
)

from latentmill.errors import ConfigError, requirement

MAX_CHANNELS = 16
MAX_SECONDS = 120.0
MAX_PAGE = 200
MAX_CONDITIONS = 16
MAX_TEXT = 4096

_Frame = Annotated[int, Field(ge=-(2**31), lt=2**31)]
_Integer = Annotated[int, Field(ge=-(2**64), le=2**64)]  # others are compared as floats
_Key = Annotated[str, Field(max_length=1 << 15)]


def _one_reason(value: object, check: ValidatorFunctionWrapHandler) -> Any:
    """pydantic would report a reason for each type of the union."""
    try:
        return check(value)
    except ValidationError as error:
        raise ValueError(
            f"expected a number, true, false or text of up to {MAX_TEXT} characters"
        ) from error


_Value = Annotated[
    bool | _Integer | float | Annotated[str, Field(max_length=MAX_TEXT)],
    WrapValidator(_one_reason),
]


class _Request(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class FieldCondition(_Request):
    """A condition on one field: `min` and `max` for numbers, `is` and `contains` for the others."""

    field: Annotated[str, Field(max_length=200)]
    op: Literal["is", "contains", "min", "max"]
    value: _Value


class Search(_Request):
    """Records whose key matches `key` and that meet all conditions.

    `key` is a part of the key, or a pattern for the whole key if it has `*` or `?`; upper and lower
    case are equal.
    """

    key: Annotated[str, Field(max_length=MAX_TEXT)] = ""
    where: Annotated[tuple[FieldCondition, ...], Field(max_length=MAX_CONDITIONS)] = ()
    sort: Annotated[str, Field(max_length=200)] = "key"
    descending: bool = False


class Channel(_Request):
    """One record in a mix.

    Attributes:
        key: Key of the record.
        gain_db: Gain in dB.
        mute: Whether it is left out. The mix stays as long as with it.
        pan: Balance from -1 (only left) to 1 (only right), for stores with `--channels split`.
        offset: Frame of the mix at which the record begins; may be negative.
    """

    key: _Key
    gain_db: Annotated[float, Field(ge=-120, le=24)] = 0.0
    mute: bool = False
    pan: Annotated[float, Field(ge=-1, le=1)] = 0.0
    offset: _Frame = 0

    @property
    def gain(self) -> float:
        """The gain as a factor, with the digits that the Python lines show."""
        return 0.0 if self.mute else round(10 ** (self.gain_db / 20), 6)


class MixRequest(_Request):
    """Channels, and the part of their mix to hear: `frames` frames from frame `start` on."""

    channels: Annotated[tuple[Channel, ...], Field(min_length=1)]
    start: Annotated[int, Field(ge=0, lt=2**31)] = 0
    frames: Annotated[int, Field(ge=1, lt=2**31)] | None = None


_Kind = TypeVar("_Kind", bound=_Request)


def parsed(kind: type[_Kind], values: Mapping[str, Any]) -> _Kind:
    """Check the values of a request; ConfigError with one sentence if one is invalid."""
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        fault = error.errors()[0]
        where = ".".join(map(str, fault["loc"])) or "request"
        raise ConfigError(
            f"invalid {where}: {requirement(fault['type'], fault['msg'])}."
        ) from error


def parsed_json(text: str, name: str) -> Any:
    """Parse a parameter that is JSON; ConfigError if it is not."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"invalid {name}: it must be JSON.") from error


def mix_of(text: str) -> MixRequest:
    """The mix in a request."""
    mix = parsed(MixRequest, _object(parsed_json(text, "mix"), "mix"))
    if len(mix.channels) > MAX_CHANNELS:
        raise ConfigError(
            f"The mix has {len(mix.channels)} channels, but at most {MAX_CHANNELS} can be mixed "
            "here: remove some, or use lm.mix in Python."
        )
    return mix


def _object(value: Any, name: str) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise ConfigError(f"invalid {name}: it must be a JSON object.")
    return value
