"""Histograms and channel charts as positions, which the page draws as SVG."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Values = npt.NDArray[np.float64]

_DURATIONS = (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 30, 60, 120, 300, 600, 1200, 1800, 3600, 7200, 18000)
WIDTH, HEIGHT = 1000.0, 100.0  # of the paths of channels


@dataclass(frozen=True)
class Histogram:
    """Counts between limits; `labels` describe the bins.

    Attributes:
        ticks: Positions in percent of the width, and texts.
        missing: Number of values that are NaN.
    """

    labels: tuple[str, ...]
    counts: tuple[int, ...]
    ticks: tuple[tuple[float, str], ...]
    missing: int = 0

    @property
    def most(self) -> int:
        """The largest count, at least 1."""
        return max(1, *self.counts)


def durations(seconds: Values) -> Histogram:
    """Durations by rounded, roughly logarithmic limits."""
    return _histogram(seconds, _DURATIONS, [_duration(limit) for limit in _DURATIONS])


def loudness(decibels: Values) -> Histogram:
    """Levels in steps of 5 dB; the first bin has everything quieter, also digital silence."""
    limits = [float(limit) for limit in range(-60, 1, 5)]
    return _histogram(decibels, limits, [f"{limit:g}" for limit in limits], " dBFS")


def silence(shares: Values) -> Histogram:
    """Shares of silent frames: none, in steps of 10 %, all."""
    limits = [1e-9, *(n / 10 for n in range(1, 10)), 1 - 1e-9]
    counts = np.bincount(np.searchsorted(limits, shares[~np.isnan(shares)], "right"), minlength=12)
    labels = ["none", *(f"{10 * n} to {10 * n + 10} %" for n in range(10)), "all"]
    ticks = ((50 / 12, "none"), (50.0, "50 %"), (100 - 50 / 12, "all"))
    return Histogram(tuple(labels), tuple(counts.tolist()), ticks, int(np.isnan(shares).sum()))


def _histogram(
    values: Values, limits: Sequence[float], names: Sequence[str], unit: str = ""
) -> Histogram:
    """Count values from each limit to the next; empty bins at the ends are left out."""
    present = values[~np.isnan(values)]
    counts = np.bincount(np.searchsorted(limits, present, "right"), minlength=len(limits) + 1)
    labels = [f"under {names[0]}{unit}"]
    labels += [f"{a} to {b}{unit}" for a, b in itertools.pairwise(names)]
    labels.append(f"{names[-1]}{unit} or more")
    used = np.flatnonzero(counts)
    first, last = (int(used[0]), int(used[-1])) if len(used) else (0, 0)
    part = slice(first, last + 1)
    inner = names[first:last]  # the limits between the bins
    every = max(1, -(-len(inner) // 6))
    ticks = [(100 * (n + 1) / (last - first + 1), inner[n]) for n in range(0, len(inner), every)]
    ticks = ticks or [(50.0, labels[first])]
    missing = len(values) - len(present)
    return Histogram(tuple(labels[part]), tuple(counts[part].tolist()), tuple(ticks), missing)


def _duration(seconds: float) -> str:
    for size, unit in ((3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:g} {unit}"
    return f"{seconds:g} s"


@dataclass(frozen=True)
class ChannelChart:
    """A range for each channel, on one scale from `low` to `high`.

    Attributes:
        zero: The height of zero.
        area: Path of the ranges.
        line: Path of the value between; empty if there is none.
    """

    low: float
    high: float
    zero: float
    area: str
    line: str = ""


def channel_chart(mean: Sequence[float], deviation: Sequence[float]) -> ChannelChart:
    """The mean of each channel, and one deviation on either side."""
    middle, spread = np.array(mean, float), np.array(deviation, float)
    return _chart(middle - spread, middle + spread, middle)


def range_chart(low: Sequence[float], high: Sequence[float]) -> ChannelChart:
    """The smallest and the largest value of each channel."""
    return _chart(np.array(low, float), np.array(high, float), None)


@dataclass(frozen=True)
class Correlation:
    """Correlation of the channels with themselves, over time.

    Attributes:
        chart: The mean over channels, and the 10 % and 90 % quantiles on either side.
        rows: Distance in frames and in seconds (None without a rate); mean, 10 % and 90 %
            quantile over channels.
    """

    chart: ChannelChart
    rows: tuple[tuple[int, float | None, float, float, float], ...]


def correlation(by_lag: Mapping[str, Sequence[float]], rate: float | None) -> Correlation | None:
    """Correlations of each channel by distance in frames; `rate` is in frames per second."""
    lags = sorted(int(lag) for lag, values in by_lag.items() if values)
    if not lags:
        return None
    table = np.array([by_lag[str(lag)] for lag in lags], float)
    mean, (low, high) = table.mean(axis=1), np.quantile(table, (0.1, 0.9), axis=1)
    columns = (mean.tolist(), low.tolist(), high.tolist())
    times = [lag / rate if rate else None for lag in lags]
    rows = zip(lags, times, *columns, strict=True)
    return Correlation(_chart(low, high, mean, scale=(-1.0, 1.0)), tuple(rows))


def _chart(
    low: Values, high: Values, middle: Values | None, scale: tuple[float, float] | None = None
) -> ChannelChart:
    """`scale` is the lowest and the highest value of the chart; None for those of the data."""
    least, most = scale or (float(low.min()), float(high.max()))
    span = most - least or 1.0
    first, last = (HEIGHT * (most - ends) / span for ends in (low, high))
    line = "" if middle is None else _line(HEIGHT * (most - middle) / span)
    zero = float(np.clip(HEIGHT * most / span, 0, HEIGHT))
    return ChannelChart(least, most, zero, _area(first, last), line)


def _steps(heights: Values) -> list[tuple[float, float]]:
    """Points of a line with one flat step for each channel."""
    width = WIDTH / len(heights)
    return [
        (x, float(height)) for n, height in enumerate(heights) for x in (n * width, (n + 1) * width)
    ]


def _line(heights: Values) -> str:
    return "M" + "L".join(f"{x:.1f} {y:.2f}" for x, y in _steps(heights))


def _area(first: Values, second: Values) -> str:
    there, back = _steps(first), _steps(second)[::-1]
    return "M" + "L".join(f"{x:.1f} {y:.2f}" for x, y in [*there, *back]) + "Z"
