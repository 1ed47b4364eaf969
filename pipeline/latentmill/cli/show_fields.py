"""What is printed about fields."""

from __future__ import annotations

from typing import TYPE_CHECKING

from latentmill.store.describe import frames_or_vectors
from latentmill.store.schema import DatasetInfo
from latentmill.text.printing import counted, size_text

if TYPE_CHECKING:
    from latentmill.run.run import RunSummary


def show_field(rows: dict[str, str], info: DatasetInfo) -> None:
    """Put what a field is into the rows of `info`, without the rate and chunks that it lacks."""
    field = info.field
    assert field is not None
    rows["field"] = f"{field.name}: {field.kind} from {field.source}"
    if field.vectors:
        rows["latents"] = f"{frames_or_vectors(info)}, {info.dtype}"
        rows["audio"] = f"{info.hours:.3f} h, {info.frames} {field.vectors}"
    if field.source != "audio":
        rows["model"] = info.model["name"]
        del rows["chunking"]


def unknown_keys(run: RunSummary) -> str:
    """A line about keys of an imported file."""
    if not run.unknown:
        return ""
    more = "" if run.unknown == len(run.unknown_keys) else ", ..."
    keys = counted(run.unknown, "key")
    return f"  {keys} of the file not in the store: {', '.join(run.unknown_keys)}{more}"


def field_line(name: str, run: RunSummary) -> str:
    """A line about a field that was computed with its store."""
    info = run.info
    return (
        f"  field {name}: {info.encoded} encoded, {info.skipped} skipped, {info.failed} failed of "
        f"{counted(info.items, 'item')}, {size_text(sum(shard.bytes for shard in info.shards))}"
    )


def waiting_units(run: RunSummary) -> str:
    """A line about units of a field that cannot be computed yet."""
    if not run.waiting:
        return ""
    return (
        f"  {counted(run.waiting, 'unit')} of {run.units} not encoded in the store yet: "
        "run this command again when the run that encodes it has ended"
    )
