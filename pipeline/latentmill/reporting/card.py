"""The linearity card as rows of a chart: medians with intervals, and bounds beside them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from latentmill.ops.origin import POOR, POOR_DB
from latentmill.store.results import LinearityEntry, ScoreEntry
from latentmill.text.printing import number_text

_FORMS = ("origin", "raw", "mix")
_AGAINST = {
    "decoded": "against the decoded target",
    "sum": "against the sum of the decoded sounds",
    "audio": "against the audio",
}
_BOUNDS = {
    "twice": "the target decoded twice",
    "reconstruction": "the target's own reconstruction",
    "unchanged": "no arithmetic",
}


@dataclass(frozen=True)
class _Kind:
    """How a measure is shown."""

    title: str
    hint: str
    unit: str = ""
    logarithmic: bool = False


_KINDS = {
    "relative_l2": _Kind(
        "Relative error of latents", "lower is better; 1 is as wrong as silence", "", True
    ),
    "si_sdr": _Kind("SI-SDR of decoded sums and differences", "higher is better", " dB"),
    "snr": _Kind("SNR of scaled sounds", "higher is better", " dB"),
    "mr_stft": _Kind("Multi-resolution STFT distance", "lower is better", "", True),
    "log_mel": _Kind("Log-mel distance", "lower is better", " dB", True),
    "level": _Kind("Level error", "0 is right", " dB"),
    "mix_rate": _Kind("Mix rate", "lower is better; 1 is as good as encoding the mix"),
}
_MAIN = ("relative_l2", "si_sdr", "mix_rate")
_METRICS = {  # as in docs/latents.md
    "encoder_homogeneity": "The latent of a sound at another gain, against the scaled latent of "
    "the sound.",
    "decoder_homogeneity": "The decoded scaled latent, against the decoded latent at the same "
    "gain.",
    "encoder_additivity": "The sum of the latents of two sounds, against the latent of their sum.",
    "encoder_composition": "The sum of the latents of all stems, against the latent of their mix.",
    "decoder_additivity": "The decoded sum of the latents of two sounds, against three targets: "
    "the decoded latent of their sum, the sum of the decoded sounds, and the sum of the audio.",
    "decoder_composition": "The same for all stems of a group.",
    "separation": "The latent of a mix minus that of all but one sound, decoded, against that "
    "sound: decoded, and as audio.",
    "removal": "The latent of a mix minus that of one sound, decoded, against the mix without it: "
    "decoded, and as audio.",
    "mix_rate": "The MR-STFT distance of the decoded mean of two latents from the mixed audio, "
    "divided by that of the mix that was encoded and decoded.",
    "reconstruction": "The decoded latent of a sound, against the sound.",
}
_MEASURES = {
    "relative_l2": "The norm of the difference of two latents, divided by the norm of the target "
    "without the latent of silence.",
    "si_sdr": "SI-SDR is the level of the target above the error, in dB, after the gain of the "
    "result was fitted.",
    "snr": "SNR is the level of the target above the error, in dB.",
    "mr_stft": "MR-STFT compares magnitudes of spectrograms of three resolutions; it ignores "
    "phase.",
    "log_mel": "The log-mel distance is the mean difference of two mel spectrograms, in dB.",
    "level": "The level error is the fitted gain, in dB.",
}


@dataclass(frozen=True)
class Bar:
    """A median with its interval; positions in percent of the width."""

    form: str
    text: str
    at: float
    begin: float
    end: float


@dataclass(frozen=True)
class Bound:
    """A value that the medians can be compared with."""

    name: str
    text: str
    at: float


@dataclass(frozen=True)
class ChartRow:
    label: str
    detail: str
    bars: tuple[Bar, ...]
    bounds: tuple[Bound, ...]


@dataclass(frozen=True)
class Panel:
    """The chart of one measure; `ticks` and `limit` are (position, text).

    Attributes:
        main: Whether it is shown at once, and not folded away.
    """

    name: str
    title: str
    hint: str
    main: bool
    rows: tuple[ChartRow, ...]
    ticks: tuple[tuple[float, str], ...]
    limit: tuple[float, str] | None


def verdict(card: LinearityEntry) -> tuple[str, ...]:
    """The operations whose error is beyond the limits of the warnings of `ops`."""
    beyond = {
        "scaling": card.homogeneity > POOR,
        "adding": card.additivity > POOR,
        "subtracting": card.removal is not None and card.removal < POOR_DB,
    }
    return tuple(name for name, is_poor in beyond.items() if is_poor)


def definitions(card: LinearityEntry) -> list[tuple[str, str]]:
    """What the card compares, in the order of the charts: names and sentences."""
    metrics = {one.metric for one in card.scores}
    measures = {one.measure for one in card.scores}
    found: list[tuple[str, str]] = [
        (name, text) for name, text in _METRICS.items() if name in metrics
    ]
    found += [(_KINDS[name].title, text) for name, text in _MEASURES.items() if name in measures]
    if any(one.noise for one in card.scores):
        found.append(
            (
                "noise",
                "The decoder draws noise. Shared: the same noise for the result and its target. "
                "Independent: different noise.",
            )
        )
    return [(name.replace("_", " "), text) for name, text in found]


def panels(card: LinearityEntry) -> list[Panel]:
    """One chart for each measure that the card has."""
    return [
        _panel(measure, kind, scores)
        for measure, kind in _KINDS.items()
        if (scores := [one for one in card.scores if one.measure == measure])
    ]


def _panel(measure: str, kind: _Kind, scores: Sequence[ScoreEntry]) -> Panel:
    shown = [one for one in scores if one.form in _FORMS or one.metric == "reconstruction"]
    values = [value for one in shown for value in (one.low, one.median, one.high)]
    values += [one.median for one in scores if one.form in ("unchanged", "reconstruction")]
    limit = {"relative_l2": POOR, "si_sdr": POOR_DB, "mix_rate": 1.0, "level": 0.0}.get(measure)
    axis = Axis.of([*values, *([] if limit is None else [limit])], kind.logarithmic)
    rows: dict[tuple[object, ...], list[ScoreEntry]] = {}
    for one in shown:
        rows.setdefault((one.metric, one.against, one.noise, one.gain), []).append(one)
    return Panel(
        measure,
        kind.title,
        kind.hint,
        measure in _MAIN,
        tuple(_row(key, ones, scores, axis, kind.unit) for key, ones in rows.items()),
        axis.ticks(kind.unit),
        None if limit is None else (axis.at(limit), f"{limit:g}{kind.unit}"),
    )


def _row(
    key: tuple[object, ...],
    shown: Sequence[ScoreEntry],
    scores: Iterable[ScoreEntry],
    axis: Axis,
    unit: str,
) -> ChartRow:
    metric, against, noise, gain = key
    detail = "" if metric == "reconstruction" else _AGAINST.get(str(against), "")
    if noise is not None:
        detail = f"{detail}, {noise} noise".removeprefix(", ")
    label = str(metric).replace("_", " ")
    bars = tuple(
        Bar(
            {"reconstruction": "origin"}.get(one.form, one.form),
            f"{number_text(one.median)}{unit} [{number_text(one.low)}, {number_text(one.high)}]",
            axis.at(one.median),
            axis.at(one.low),
            axis.at(one.high),
        )
        for one in shown
    )
    bounds = {
        one.form: Bound(_BOUNDS[one.form], f"{number_text(one.median)}{unit}", axis.at(one.median))
        for one in scores
        if one.form in _BOUNDS
        and (one.metric, one.against) == (metric, against)
        and one.metric != "reconstruction"
        and one.gain in (None, gain)
        and one.noise in (None, noise)
    }
    return ChartRow(
        f"{label}, gain {gain:g}" if isinstance(gain, float) else label,
        detail,
        bars,
        tuple(bounds.values()),
    )


@dataclass(frozen=True)
class Axis:
    """Positions of values in percent of the width; values beyond the ends are at the ends."""

    low: float
    high: float
    logarithmic: bool

    @classmethod
    def of(cls, values: Iterable[float], logarithmic: bool) -> Axis:
        """An axis with round ends that contains the values."""
        finite = [value for value in values if math.isfinite(value)]
        if logarithmic:
            positive = [value for value in finite if value > 0] or [1.0]
            low = float(math.floor(math.log10(min(positive))))
            return cls(low, max(low + 1, math.ceil(math.log10(max(positive)))), True)
        low, high = min(finite, default=0.0), max(finite, default=1.0)
        step = _step(high - low or abs(high) or 1.0)
        bottom, top = math.floor(low / step) * step, math.ceil(high / step) * step
        return cls(bottom, top if top > bottom else bottom + step, False)

    def at(self, value: float) -> float:
        """The position of a value, from 1 to 99."""
        if self.logarithmic:
            value = math.log10(value) if value > 0 else self.low
        share = (value - self.low) / (self.high - self.low)
        return round(1 + 98 * min(1.0, max(0.0, share)), 2)

    def ticks(self, unit: str = "") -> tuple[tuple[float, str], ...]:
        """Positions and labels of at most six round values."""
        if self.logarithmic:
            every = max(1, math.ceil((self.high - self.low) / 5))
            powers = range(int(self.low), int(self.high) + 1, every)
            return tuple((self.at(10.0**power), f"{10.0**power:g}") for power in powers)
        step = _step(self.high - self.low)
        count = round((self.high - self.low) / step)
        every = max(1, math.ceil(count / 5))
        values = [self.low + n * step for n in range(0, count + 1, every)]
        return tuple((self.at(v), f"{0.0 if abs(v) < step / 1e6 else v:.6g}{unit}") for v in values)


def _step(span: float) -> float:
    """A round step, of which the span has five to ten."""
    power = 10.0 ** math.floor(math.log10(span / 5))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power * 10 >= span)
