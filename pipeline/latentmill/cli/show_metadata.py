"""Parts of the text of a run: updated metadata, and keys of an imported file."""

from __future__ import annotations

from typing import TYPE_CHECKING

from latentmill.text.printing import counted

if TYPE_CHECKING:
    from latentmill.curation.refresh import RefreshSummary
    from latentmill.run.run import RunSummary


def unknown_keys(run: RunSummary) -> str:
    """A line about keys of an imported file."""
    if not run.unknown:
        return ""
    more = "" if run.unknown == len(run.unknown_keys) else ", ..."
    keys = counted(run.unknown, "key")
    return f"  {keys} of the file not in the store: {', '.join(run.unknown_keys)}{more}"


def waiting_units(run: RunSummary) -> str:
    """A line about units of a field that cannot be computed yet."""
    if not run.waiting:
        return ""
    return (
        f"  {counted(run.waiting, 'unit')} of {run.units} not encoded in the store yet: "
        "run this command again when the run that encodes it has ended"
    )


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
