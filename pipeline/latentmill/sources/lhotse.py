"""Lhotse's cut manifests: a cut is a recording, or a segment of one, with its supervisions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from latentmill.sources.base import Segment

_READABLE = ("file", "url")
_CONSUMED = ("recording", "start", "duration", "channel", "type", "features")


class Unusable(Exception):  # noqa: N818  counted, not raised to the user
    """A cut that is no item, and why."""


@dataclass(frozen=True)
class Cut:
    """What an item needs of a cut.

    Attributes:
        id: Its id.
        path: Where its recording is.
        duration: Seconds.
        segment: The part of the recording; None if it is all of it.
        metadata: Everything else: supervisions, custom fields.
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

    Raises:
        Unusable: It has no single recording that can be taken as it is.
        KeyError, TypeError, ValueError, AttributeError: It is no cut after all.
    """
    recording = row.get("recording")
    if recording is None:
        raise Unusable(f"{row['type']} without a recording")
    if recording.get("transforms"):
        raise Unusable("cuts that transform their recording")
    sources = recording["sources"]
    if len(sources) != 1 or sources[0].get("type") not in _READABLE:
        # A source of the type `command` is a shell command, which nobody runs here.
        raise Unusable("cuts whose recording is not one file or URL")
    channels = recording.get("channel_ids") or sources[0]["channels"]
    wanted = row.get("channel", 0)
    if sorted(wanted if isinstance(wanted, list) else [wanted]) != sorted(channels):
        raise Unusable("cuts of some channels of their recording")
    path = sources[0]["source"]
    if not isinstance(path, str):
        raise TypeError("a path is text")
    start, duration = round(float(row["start"]), 6), round(float(row["duration"]), 6)
    if start < 0 or duration <= 0:
        raise ValueError("a cut has a length")
    whole = start == 0 and abs(duration - float(recording["duration"])) < 1e-6
    return Cut(
        id=str(row["id"]),
        path=path,
        duration=duration,
        segment=None if whole else Segment(start, duration),
        metadata={name: value for name, value in row.items() if name not in _CONSUMED},
    )
