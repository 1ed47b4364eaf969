"""Part of the text of a run: updated metadata."""

from __future__ import annotations

from typing import TYPE_CHECKING

from latentmill.text.printing import counted

if TYPE_CHECKING:
    from latentmill.curation.refresh import RefreshSummary


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
