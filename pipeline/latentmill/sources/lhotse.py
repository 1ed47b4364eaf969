"""Lhotse cut manifests: a cut is a recording or a segment of one, with its supervisions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from latentmill.sources.base import Segment

_READABLE = ("file", "url")
_CONSUMED = ("recording", "start", "duration", "channel", "type", "features")


class Unusable(Exception):  # noqa: N818  counted, not raised to the user
    """Why a cut was skipped."""


@dataclass(frozen=True)
class Cut:
    """The parts of a cut that an item needs.

    Attributes:
        id: Id of the cut.
        path: Path or URL of its recording.
        duration: Seconds.
        segment: The part of the recording; None: all of it.
        metadata: All other fields: supervisions, custom fields.
    """

    id: str
    path: str
    duration: float
    segment: Segment | None
    metadata: dict[str, Any]


def is_cut(row: dict[str, Any]) -> bool:
    """Whether a row of a JSONL file is a cut (`lhotse.cut.Cut.to_dict`)."""
    kind = row.get("type")
    return isinstance(kind, str) and kind.endswith("Cut") and "id" in row


def read_cut(row: dict[str, Any]) -> Cut:
    """Read a cut.

    Raises Unusable if it is not a plain part of one recording, and KeyError, TypeError, ValueError
    or AttributeError if it is not a valid cut.
    """
    recording = row.get("recording")
    if recording is None:
        raise Unusable(f"{row['type']} without a recording")
    if recording.get("transforms"):
        raise Unusable("cuts that transform their recording")
    sources = recording["sources"]
    if len(sources) != 1 or sources[0].get("type") not in _READABLE:
        # A source of the type `command` is a shell command, which is never executed.
        raise Unusable("cuts whose recording is not one file or URL")
    channels = recording.get("channel_ids") or sources[0]["channels"]
    wanted = row.get("channel", 0)
    if sorted(wanted if isinstance(wanted, list) else [wanted]) != sorted(channels):
        raise Unusable("cuts of some channels of their recording")
    path = sources[0]["source"]
    if not isinstance(path, str):
        raise TypeError("the path is not a string")
    start, duration = round(float(row["start"]), 6), round(float(row["duration"]), 6)
    if start < 0 or duration <= 0:
        raise ValueError("the cut has no length")
    whole = start == 0 and abs(duration - float(recording["duration"])) < 1e-6
    return Cut(
        id=str(row["id"]),
        path=path,
        duration=duration,
        segment=None if whole else Segment(start, duration),
        metadata={name: value for name, value in row.items() if name not in _CONSUMED},
    )
