"""Parts of the text of a run: updated metadata, and latents that were kept."""

from __future__ import annotations

from typing import TYPE_CHECKING

from latentmill.text.printing import counted

if TYPE_CHECKING:
    from latentmill.curation.refresh import RefreshSummary
    from latentmill.run.run import RunSummary

MAX_KEPT = 20  # listed


def refreshed_metadata(value: RefreshSummary | None) -> str:
    """Lines about metadata that were updated in the store."""
    if value is None:
        return ""
    version = f" (annotations version {value.version})" if value.version else ""
    lines = [
        f"  metadata updated: {counted(value.values, 'value')} of "
        f"{counted(value.records, 'record')}{version}"
    ]
    for count, what in (
        (value.kept, "set by annotate and not updated"),
        (value.removed, "no longer in the source, kept in the store"),
    ):
        lines += [f"  {counted(count, 'value')} {what}"] if count else []
    if value.ignored:
        lines.append(f"  names that cannot be annotated: {', '.join(value.ignored)}")
    lines += [f"  metadata not read: {key}: {reason}" for key, reason in value.reasons]
    more = value.unreadable - len(value.reasons)
    return "\n".join(lines + ([f"  and {more} more"] if more else []))


def kept_latents(run: RunSummary) -> str:
    """Lines about items of a run and its fields that could not be encoded again."""
    lines = []
    for place, one in [("", run), *((f" in {name}", one) for name, one in run.fields.items())]:
        if one.kept:
            lines.append(
                f"  {counted(len(one.kept), 'item')} not encoded again{place}, the earlier latents "
                "are kept (--retry-failed tries again):"
            )
        lines += [f"  kept{place}: {key}: {reason}" for key, reason in one.kept[:MAX_KEPT]]
        more = len(one.kept) - MAX_KEPT
        lines += [f"  ... and {more} more (kept{place}); --json lists all"] if more > 0 else []
    return "\n".join(lines)
