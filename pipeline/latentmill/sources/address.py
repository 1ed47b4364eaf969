"""The address of an item's audio as one line: the `source_uri` of its record.

The address of a file is its URI. The address of a part of a file has a fragment:
`music.tar#bytes=1536-89712` (first and last byte), `train.parquet#cell=3,17,audio` (row group, row
in it, column), `concert.wav#t=12.5,17` (seconds; without a second number: to the end), as in media
fragments (https://www.w3.org/TR/media-frags), or two of them joined by `&`.
"""

from __future__ import annotations

import re
from pathlib import PurePosixPath

import pyarrow as pa

from latentmill.sources.base import ByteRange, Item, Segment, TableCell

_FRAGMENT = re.compile(
    r"(?P<uri>.*)#"
    r"(?:bytes=(?P<first>\d+)-(?P<last>\d+)|cell=(?P<group>\d+),(?P<row>\d+),(?P<column>[^#&]+))?"
    r"(?:(?<!#)&)?(?:t=(?P<start>\d+(?:\.\d+)?),(?P<end>\d+(?:\.\d+)?)?)?",
    re.DOTALL,
)

# The same for many addresses at once, in the syntax of RE2.
_SEGMENT = (
    r"#(?:(?:bytes=[0-9]+-[0-9]+|cell=[0-9]+,[0-9]+,[^#&]+)&)?"
    r"t=(?P<start>[0-9]+(?:\.[0-9]+)?),(?:[0-9]+(?:\.[0-9]+)?)?$"
)


def address_of(item: Item) -> str:
    """The address of an item's audio; `item_at` is the inverse."""
    parts = []
    if isinstance(item.place, ByteRange):
        parts.append(f"bytes={item.place.offset}-{item.place.offset + item.place.size - 1}")
    elif item.place is not None:
        parts.append(f"cell={item.place.row_group},{item.place.row},{item.place.column}")
    if item.segment is not None:
        parts.append(f"t={segment_text(item.segment, ',')}")
    return f"{item.uri}#{'&'.join(parts)}" if parts else item.uri


def item_at(address: str) -> Item:
    """An item that has only the place of its audio, read from an address."""
    match = _FRAGMENT.fullmatch(address)
    if match is None or not (match["first"] or match["group"] or match["start"]):
        return Item("", address, 0, "")
    place: ByteRange | TableCell | None = None
    if match["first"]:
        first, last = int(match["first"]), int(match["last"])
        place = ByteRange(first, last - first + 1)
    elif match["group"]:
        place = TableCell(int(match["group"]), int(match["row"]), match["column"])
    segment = None
    if match["start"]:
        start = float(match["start"])
        segment = Segment(start, round(float(match["end"]) - start, 6) if match["end"] else None)
    return Item("", match["uri"], 0, "", place=place, segment=segment)


def format_at(address: str) -> str:
    """The suffix of the file at an address, such as `flac`, in lower case; `none` without one."""
    uri = item_at(address).uri if "#" in address else address  # names of files may contain `#`
    return PurePosixPath(uri).suffix.lower().lstrip(".") or "none"


def starts_at(addresses: pa.Array | pa.ChunkedArray) -> list[float | None]:
    """Where segments begin in their recordings, in seconds; None where there is no segment."""
    import pyarrow.compute as pc  # slow, and most commands do not need it

    starts = pc.struct_field(pc.extract_regex(addresses, _SEGMENT), "start")
    found: list[float | None] = starts.cast(pa.float64()).to_pylist()
    return found


def segment_text(segment: Segment, between: str) -> str:
    """`12.5-17.25`: where a segment begins and ends, in seconds, to the microsecond."""
    end = "" if segment.duration is None else seconds_text(segment.start + segment.duration)
    return f"{seconds_text(segment.start)}{between}{end}"


def seconds_text(value: float) -> str:
    """`12.5`: seconds, to the microsecond."""
    return f"{value:.6f}".rstrip("0").rstrip(".")
