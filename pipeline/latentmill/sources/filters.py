"""Filters of a run: items that they skip get a reason that begins with the name of the filter."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from latentmill.sources.base import Item
from latentmill.sources.where import Condition


@dataclass(frozen=True)
class Filters:
    """The filters of a run; a filter that is None is off. A reason is `name: value`.

    Attributes:
        min_seconds: Minimum length of an item.
        max_seconds: Maximum length of an item.
        min_rms: Minimum RMS of an item in dB of full scale, at the model's rate and channels.
        min_sample_rate: Minimum sample rate of a recording, Hz.
        max_sample_rate: Maximum sample rate, Hz.
        min_channels: Minimum number of channels of a recording.
        max_channels: Maximum number of channels.
        where: A condition on the metadata; see `Condition`.
    """

    min_seconds: float | None = None
    max_seconds: float | None = None
    min_rms: float | None = None
    min_sample_rate: int | None = None
    max_sample_rate: int | None = None
    min_channels: int | None = None
    max_channels: int | None = None
    where: str | None = None

    def of_source(self, item: Item, metadata: Mapping[str, Any]) -> str | None:
        """Why an item is skipped because of its metadata or known length; None if it is kept."""
        if self._condition is not None and not self._condition.holds(metadata):
            return f"where: not {self._condition.text}"
        return None if item.seconds is None else self.of_length(item.seconds)

    def of_header(self, sample_rate: int, channels: int) -> str | None:
        """Why an item is skipped because of its header; None if it is kept."""
        return _outside("sample_rate", sample_rate, self.min_sample_rate, self.max_sample_rate) or (
            _outside("channels", channels, self.min_channels, self.max_channels)
        )

    def of_length(self, seconds: float) -> str | None:
        """Why an item is skipped because of its length; None if it is kept."""
        return _outside("seconds", seconds, self.min_seconds, self.max_seconds)

    def of_audio(self, rms: float) -> str | None:
        """Why an item is skipped because of its samples (`rms` of 1 is full scale), or None."""
        level = 20 * math.log10(rms) if rms > 0 else -math.inf
        if self.min_rms is not None and level < self.min_rms:
            return f"min_rms: {level:.1f} dBFS"
        return None

    @cached_property
    def _condition(self) -> Condition | None:
        return None if self.where is None else Condition(self.where)


NO_FILTERS = Filters()

RANGES = ("seconds", "sample_rate", "channels")
"""Properties with a `min_` and a `max_` filter."""

_UNITS = {"seconds": "{:.3f} s", "sample_rate": "{} Hz", "channels": "{}"}


def _outside(name: str, value: float, low: float | None, high: float | None) -> str | None:
    text = _UNITS[name].format(value)
    if low is not None and value < low:
        return f"min_{name}: {text}"
    return f"max_{name}: {text}" if high is not None and value > high else None
