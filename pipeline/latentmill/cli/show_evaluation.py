"""What `evaluate` prints."""

from __future__ import annotations

from typing import TYPE_CHECKING

from latentmill.text.printing import counted

if TYPE_CHECKING:
    from latentmill.evaluation.evaluate import Evaluation
    from latentmill.evaluation.linearity import LinearityReport
    from latentmill.evaluation.seams import SeamReport


def evaluation(result: Evaluation) -> str:
    """The text that `evaluate` prints: one paragraph for each part."""
    parts = []
    if result.linearity is not None:
        parts.append(f"linearity\n{linearity(result.linearity)}")
    if result.seams is not None:
        parts.append(f"seams\n{seams(result.seams)}")
    parts += [f"{part}\nnot measured: {why}" for part, why in result.unavailable.items()]
    return "\n\n".join(parts)


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


def linearity(report: LinearityReport) -> str:
    """The paragraph about linearity."""
    card = report.card
    gains = ", ".join(f"{error:.3g} at gain {gain}" for gain, error in card.by_gain.items())
    verdict = (
        f"poor: the error of {' and '.join(report.poor)} latents is above {report.limit:g}"
        if report.poor
        else f"good: every error is at most {report.limit:g}"
    )
    return "\n".join(
        (
            f"scaling   relative error {card.homogeneity:.3g} (mean {card.homogeneity_mean:.3g}) "
            f"with the origin, {card.homogeneity_raw:.3g} without, of {card.items} items ({gains})",
            f"adding    relative error {card.additivity:.3g} (mean {card.additivity_mean:.3g}) "
            f"with the origin, {card.additivity_raw:.3g} without, of {card.pairs} pairs",
            f"raw norm  scaling {card.homogeneity_raw_norm:.3g}, adding "
            f"{card.additivity_raw_norm:.3g} (divided by the norm of the latent with its origin)",
            verdict,
        )
    )
