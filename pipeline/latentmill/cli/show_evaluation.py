"""What `evaluate` prints."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from latentmill.text.printing import counted, number_text

if TYPE_CHECKING:
    from latentmill.evaluation.evaluate import Evaluation
    from latentmill.evaluation.linearity import LinearityReport
    from latentmill.evaluation.seams import SeamReport
    from latentmill.store.results import (
        LinearityEntry,
        ReconstructionEntry,
        ScoreEntry,
        StoreStatistics,
    )

_UNITS = {"snr": " dB", "si_sdr": " dB", "level": " dB", "log_mel": " dB"}
_MOST_LINES = 40
_FORMS = ("origin", "raw", "mix")
_BOUNDS = (
    "bounds: unchanged = the sound or mix without arithmetic; twice = the target decoded twice, "
    "with different noise; reconstruction = the target encoded and decoded"
)


def evaluation(result: Evaluation) -> str:
    """The text that `evaluate` prints: one paragraph for each part."""
    parts = []
    if result.linearity is not None:
        parts.append(f"linearity\n{linearity(result.linearity)}")
    if result.reconstruction is not None:
        parts.append(f"reconstruction\n{reconstruction(result.reconstruction)}")
    if result.statistics is not None:
        parts.append(f"statistics\n{statistics(result.statistics)}")
    if result.seams is not None:
        parts.append(f"seams\n{seams(result.seams)}")
    parts += [f"{part}\nnot measured: {why}" for part, why in result.unavailable.items()]
    return "\n\n".join(parts)


def linearity(report: LinearityReport) -> str:
    """The table of the linearity card: medians with intervals, and the bounds of each metric."""
    card = report.card
    columns = ("measure", "against", "noise", "gain", "with origin", "raw", "bounds")
    table = _aligned([columns, *_score_rows(card.scores)])
    if card.protocol != "latentmill":
        return "\n".join((_protocol(card), *table))
    kind = "stem groups" if card.grouped else "pairs of items"
    heading = (
        f"medians over {len(card.tracks)} {kind} of up to {number_text(card.seconds or 0, 4)} s, "
        f"with 95 % intervals; {counted(card.silent, 'sound')} too quiet to be scored"
    )
    verdict = (
        f"poor: {' and '.join(report.poor)} (limits: relative error {report.limit:g}, SI-SDR "
        f"{report.limit_db:g} dB)"
        if report.poor
        else f"good: scaling and adding have relative errors of at most {report.limit:g}, removing "
        f"has an SI-SDR of at least {report.limit_db:g} dB"
    )
    return "\n".join((heading, *table, _BOUNDS, verdict))


def _protocol(card: LinearityEntry) -> str:
    """The heading of a card by the protocol of other code."""
    return (
        f"protocol of {card.protocol}: {counted(card.items, 'chunk')} of "
        f"{number_text(card.seconds or 0, 4)} s from {counted(len(card.tracks), 'item')}, "
        f"{counted(card.pairs, 'pair')} of neighbours; raw arithmetic, fresh noise"
    )


def _score_rows(scores: Sequence[ScoreEntry]) -> Iterator[tuple[str, ...]]:
    """A line with the name of each metric, and below it a row for each of its measures."""
    key: tuple[object, ...]
    bounds: dict[tuple[object, ...], dict[str, str]] = {}
    forms: dict[tuple[object, ...], dict[str, ScoreEntry]] = {}
    metrics = list(dict.fromkeys(one.metric for one in scores))
    for one in sorted(scores, key=lambda one: metrics.index(one.metric)):
        key = (one.metric, one.measure, one.against, one.noise, one.gain)
        if one.form in _FORMS or one.metric == "reconstruction":
            forms.setdefault(key, {})["raw" if one.form == "raw" else "origin"] = one
        else:
            bounds.setdefault(key, {})[one.form] = f"{one.form} {number_text(one.median)}"
    heading = None
    for key, values in forms.items():
        metric, measure, against, noise, gain = key
        found: dict[str, str] = {}
        for noisy, factor in ((noise, gain), (None, gain), (None, None)):
            found |= bounds.get((metric, measure, against, noisy, factor), {})
        if metric != heading:
            heading = metric
            yield (f"  {metric}".replace("_", " "), *[""] * 6)
        name = f"    {measure}{_UNITS.get(str(measure), '')}".replace("_", " ")
        main, raw = values.get("origin"), values.get("raw")
        yield (
            name,
            str(against),
            str(noise or ""),
            "" if gain is None else str(gain),
            "" if main is None else _interval(main),
            "" if raw is None else number_text(raw.median),
            ", ".join(found.values()),
        )


def _interval(one: ScoreEntry) -> str:
    """A median with its interval."""
    return f"{number_text(one.median)} [{number_text(one.low)}, {number_text(one.high)}]"


def _aligned(table: Sequence[Sequence[str]]) -> list[str]:
    """Format a table with columns of equal width."""
    widths = [max(len(row[n]) for row in table) for n in range(len(table[0]))]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in table
    ]


def reconstruction(entry: ReconstructionEntry) -> str:
    """The table of the quality of decoding, and the worst items."""
    table: list[tuple[str, ...]] = [("measure", "median", "mean", "lowest", "highest")]
    for name, one in entry.summary.items():
        unit = _UNITS.get(name, "")
        values = (f"{number_text(v)}{unit}" for v in (one.median, one.mean, one.low, one.high))
        table.append((name.replace("_", " "), *values))
    lines = [f"{counted(len(entry.items), 'item')} compared, {entry.silent} silent"]
    lines += [f"{n} without source: {why}" for why, n in entry.without_source.items()]
    lines += _aligned(table)
    by_key = {item.key: item for item in entry.items}
    for key in entry.worst[:3]:
        item = by_key[key]
        snr = number_text(item.snr)
        lines.append(f"worst: {key}: MR-STFT {number_text(item.mr_stft)}, SNR {snr} dB")
    return "\n".join(lines)


def statistics(found: StoreStatistics) -> str:
    """The table of a store's contents."""
    rank, means = number_text(found.effective_rank), len(found.mean) - found.deviations
    rows = {
        "records": f"{found.records}, {found.hours:.3f} h, {found.frames} frames",
        "duration": _spread(found.seconds, "s"),
        "loudness": f"RMS {_spread(found.rms_db, 'dBFS')}",
        "silence": f"{found.silence:.1%} of the frames, {counted(found.silent_records, 'record')}",
        "rates": _counts(found.sample_rates, " Hz"),
        "channels": _counts(found.source_channels, " ch"),
        "formats": _counts(found.formats, ""),
        "range": f"{number_text(min(found.low))} to {number_text(max(found.high))}",
        "rank": f"effective rank {rank} of {means} channels",
    }
    over_time = [
        f"{number_text(sum(values) / len(values))} (distance {lag})"
        for lag, values in found.autocorrelation.items()
        if values
    ]
    if over_time:
        rows["frames"] = f"correlation over time, mean of channels: {', '.join(over_time)}"
    if found.suggested_scale is not None:
        factor = number_text(found.suggested_scale, 4)
        of = " of the means" if found.deviations else ""
        rows["scale"] = f"multiply the stored latents by {factor} for a standard deviation{of} of 1"
    if found.lufs:
        rows["lufs"] = f"{_spread(found.lufs, 'LUFS')} ({counted(found.lufs_records, 'record')})"
    elif found.lufs is None:
        rows["lufs"] = "not measured: pip install 'latentmill[loudness]'"
    totals = {
        "groups of the same file": found.same_file_groups,
        "groups of the same audio": found.same_audio_groups,
        "groups almost the same": found.near_duplicate_groups,
        "records unlike the others": found.outlier_records,
        "silent records": found.silent_records,
    }
    if any(totals.values()):
        rows["listed"] = ", ".join(f"{count} {what}" for what, count in totals.items() if count)
    lines = [f"{name:<9} {text}" for name, text in rows.items()]
    for channels, what in (
        (found.saturated_channels, "saturated"),
        (found.constant_channels, "constant"),
    ):
        if channels:
            rest = f" and {len(channels) - 20} more" if len(channels) > 20 else ""
            lines.append(f"{what} channels: {', '.join(map(str, channels[:20]))}{rest}")
    groups = [("same file", keys) for keys in found.same_file]
    groups += [("same audio", keys) for keys in found.same_audio]
    groups += [("almost the same", one.keys) for one in found.near_duplicates]
    groups += [("unlike the others", [one.key]) for one in found.outliers]
    groups += [("silent", [key]) for key in found.silent]
    lines += [f"{what}: {', '.join(keys)}" for what, keys in groups[:_MOST_LINES]]
    total = sum(totals.values())
    if total > _MOST_LINES:
        lines.append(f"... and {total - _MOST_LINES} more, see --json (at most 1,000 of each)")
    return "\n".join(lines)


def _spread(values: Mapping[str, float], unit: str) -> str:
    if not values:
        return "none"
    least, median, most = (values[name] for name in ("least", "median", "most"))
    return f"{number_text(least)} to {number_text(most)} {unit}, median {number_text(median)}"


def _counts(values: Mapping[str, int], unit: str) -> str:
    return ", ".join(f"{count} x {name}{unit}" for name, count in list(values.items())[:8])


def seams(report: SeamReport) -> str:
    """The paragraph about seams."""
    lines = [
        f"{one.key}: {one.seconds:.1f} s, relative error {one.error:.2g}, worst frame "
        f"{one.worst:.2g}"
        for one in report.items
    ]
    lines.append(
        f"relative error of chunked encoding: median {report.median:.2g}, largest "
        f"{report.largest:.2g} ({counted(len(report.items), 'item')})"
    )
    return "\n".join(lines)
