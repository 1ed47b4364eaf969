"""Collected values of the metrics, by track, and their medians with bootstrap intervals."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from latentmill.errors import ConfigError
from latentmill.store.results import Form, Metric, Noise, ScoreEntry

RESAMPLES = 1000


class Key(NamedTuple):
    """What a value belongs to; the fields are those of `ScoreEntry`."""

    metric: Metric
    measure: str
    against: str
    form: Form
    noise: Noise | None = None
    gain: float | None = None


class Scores:
    """Values by key and track, in the order in which they were added first."""

    def __init__(self) -> None:
        self._values: dict[Key, dict[int, list[float]]] = {}

    def add(self, track: int, key: Key, value: float) -> None:
        """Add a value. ConfigError if it is infinite or NaN, which results cannot contain."""
        if not math.isfinite(value):
            raise ConfigError(
                f"the {key.metric.replace('_', ' ')} error of track {track + 1} is {value:g}, "
                "because the model encodes or decodes a sound like silence: use another model, or "
                "other audio with --items or --max-seconds."
            )
        self._values.setdefault(key, {}).setdefault(track, []).append(value)

    def values(self, **fields: object) -> list[float]:
        """All values whose keys have these fields."""
        return [
            value
            for key, tracks in self._values.items()
            if all(getattr(key, name) == wanted for name, wanted in fields.items())
            for values in tracks.values()
            for value in values
        ]

    def entries(self) -> list[ScoreEntry]:
        """One entry for each key."""
        entries = []
        for key, tracks in self._values.items():
            values = [value for of_track in tracks.values() for value in of_track]
            low, high = interval(tracks.values())
            entries.append(
                ScoreEntry(
                    **key._asdict(),
                    median=float(np.median(values)),
                    mean=float(np.mean(values)),
                    low=low,
                    high=high,
                    tracks=len(tracks),
                    values=values,
                )
            )
        return entries


def interval(tracks: Iterable[list[float]]) -> tuple[float, float]:
    """The 95 % bootstrap interval of the median of all values.

    Whole tracks are drawn with replacement, because the values of one track are not independent.
    """
    groups = list(tracks)
    table = np.full((len(groups), max(map(len, groups))), np.nan)
    for row, values in zip(table, groups, strict=True):
        row[: len(values)] = values
    drawn = np.random.default_rng(0).integers(len(groups), size=(RESAMPLES, len(groups)))
    medians = np.nanmedian(table[drawn].reshape(RESAMPLES, -1), axis=1)
    low, high = np.quantile(medians, (0.025, 0.975))
    return float(low), float(high)
