"""Lists of items with reasons, in the text of several commands."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from latentmill.text.printing import counted

if TYPE_CHECKING:
    from latentmill.run.run import RunSummary

MAX_LISTED = 20


def pairs_listed(
    title: str,
    pairs: Sequence[tuple[str, str]],
    all_with: str = "`latentmill status STORE --json`",
) -> str:
    """List the first `MAX_LISTED` keys with their reasons, one per line."""
    lines = [f"  {title}: {key}: {reason}" for key, reason in pairs[:MAX_LISTED]]
    if len(pairs) > MAX_LISTED:
        lines.append(f"  ... and {len(pairs) - MAX_LISTED} more ({title}); {all_with} lists all")
    return "\n".join(lines)


def kept_latents(run: RunSummary) -> str:
    """Lines about items of a run and its fields that could not be encoded again."""
    lines = []
    for place, one in [("", run), *((f" in {name}", one) for name, one in run.fields.items())]:
        if one.kept:
            lines += [
                f"  {counted(len(one.kept), 'item')} not encoded again{place}, the earlier latents "
                "are kept (--retry-failed tries again):",
                pairs_listed(f"kept{place}", one.kept),
            ]
    return "\n".join(lines)
