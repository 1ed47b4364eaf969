"""Items as rows of an Arrow table, and estimates of unknown lengths."""

from __future__ import annotations

import math
from collections.abc import Sequence
from operator import attrgetter
from typing import Any

import pyarrow as pa
import xxhash

from latentmill.encoding.lanes import shares_data
from latentmill.sources.base import ByteRange, Item, Segment, TableCell, known_seconds

# Bytes per second of audio, to estimate a file's length from its size. The estimate affects the
# size of units and the progress bar, never the latents.
BYTES_PER_SECOND = {"wav": 176_400, "aif": 176_400, "aiff": 176_400, "flac": 100_000}
COMPRESSED_BYTES_PER_SECOND = 20_000
UNKNOWN_SECONDS = 180.0  # for a manifest row without length and size; a typical song
LONGEST_SECONDS = 1e9  # longer lengths in headers are wrong

_OPTIONAL = {
    "offset": pa.int64(),  # of a ByteRange, as `length`
    "length": pa.int64(),
    "row_group": pa.int32(),  # of a TableCell, as the next two
    "row": pa.int64(),
    "column": pa.string(),
    "start": pa.float64(),  # of a Segment, as `duration`
    "duration": pa.float64(),
    "seconds": pa.float64(),
    "group": pa.string(),
    "role": pa.string(),
    "sidecar_versions": pa.string(),  # missing in the plans of earlier versions
}

ITEMS_SCHEMA = pa.schema(
    [
        pa.field("unit", pa.int32(), nullable=False),
        pa.field("key", pa.string(), nullable=False),
        pa.field("uri", pa.string(), nullable=False),
        pa.field("size", pa.int64(), nullable=False),
        pa.field("version", pa.string(), nullable=False),
        pa.field("sidecars", pa.list_(pa.string()), nullable=False),
        pa.field("metadata", pa.string(), nullable=False),
        *(pa.field(name, kind) for name, kind in _OPTIONAL.items()),
    ]
)

# Adds columns that determine the order and the size of units. They are not stored.
DRAFT_SCHEMA = pa.schema(
    [
        *(field for field in ITEMS_SCHEMA if field.name != "unit"),
        pa.field("block", pa.string(), nullable=False),  # see `_block`
        pa.field("micros", pa.int64(), nullable=False),  # seconds, known or estimated, x 1e6
        pa.field("extension", pa.string(), nullable=False),
    ]
)

_PLAIN = attrgetter("key", "uri", "size", "version", "sidecars", "metadata", "group", "role")


def extension_of(uri: str) -> str:
    """The file name extension in lower case, or "none"."""
    name, dot, extension = uri.rpartition("/")[2].rpartition(".")
    return extension.lower() if name and dot else "none"


def _valid(seconds: float | None) -> float | None:
    return seconds if seconds is not None and 0 <= seconds < math.inf else None


def estimated_seconds(item: Item) -> float:
    """An item's known length, or an estimate from its size and extension."""
    seconds = known_seconds(item)
    if seconds is None and item.estimate is not None:
        seconds = item.estimate
    elif seconds is None and not item.size:
        seconds = UNKNOWN_SECONDS
    elif seconds is None:
        extension = item.extension or extension_of(item.uri)
        rate = BYTES_PER_SECOND.get(extension, COMPRESSED_BYTES_PER_SECOND)
        seconds = item.size / rate
        if item.segment is not None:
            seconds = max(0.0, seconds - item.segment.start)
    return min(seconds, LONGEST_SECONDS)


def draft_table(items: Sequence[Item]) -> pa.Table:
    """Convert items to rows of `DRAFT_SCHEMA`."""
    keys, uris, sizes, versions, sidecars, metadata, groups, roles = zip(
        *map(_PLAIN, items), strict=True
    )
    seconds = [_valid(item.seconds) for item in items]
    micros = [
        round(1e6 * (estimated_seconds(item) if length is None else min(length, LONGEST_SECONDS)))
        for item, length in zip(items, seconds, strict=True)
    ]
    columns: dict[str, Any] = {
        "key": keys,
        "uri": uris,
        "size": sizes,
        "version": versions,
        "sidecars": sidecars,
        "metadata": metadata,
        "seconds": seconds,
        "group": [group or None for group in groups],
        "role": roles,
        "sidecar_versions": [item.sidecar_versions or None for item in items],
        "block": list(map(_block, items)),
        "micros": micros,
        "extension": [item.extension or extension_of(item.uri) for item in items],
        **_places(items),
        **_segments(items),
    }
    arrays = [
        pa.array(columns[field.name], field.type)
        if field.name in columns
        else pa.nulls(len(items), field.type)
        for field in DRAFT_SCHEMA
    ]
    return pa.Table.from_arrays(arrays, schema=DRAFT_SCHEMA)


def _block(item: Item) -> str:
    """What determines the place of an item in the plan: its group, or else its key.

    Items without a group that share what is read follow each other in the order in which it is
    read. Their blocks contain the key, so that no two items without a group share a block.
    """
    if item.group or not shares_data(item):
        return item.group or item.key
    if isinstance(item.place, TableCell):
        position = f"{item.place.row_group:010d}\0{item.place.row:012d}"
    else:
        assert item.segment is not None
        position = f"{item.segment.start:020.6f}"
    return f"{item.uri}\0{position}\0{item.key}"


def _places(items: Sequence[Item]) -> dict[str, Any]:
    places = [item.place for item in items]
    if not any(places):
        return {}
    ranges = [place if isinstance(place, ByteRange) else None for place in places]
    cells = [place if isinstance(place, TableCell) else None for place in places]
    return {
        "offset": [one and one.offset for one in ranges],
        "length": [one and one.size for one in ranges],
        "row_group": [one and one.row_group for one in cells],
        "row": [one and one.row for one in cells],
        "column": [one and one.column for one in cells],
    }


def _segments(items: Sequence[Item]) -> dict[str, Any]:
    segments = [item.segment for item in items]
    if not any(segments):
        return {}
    return {
        "start": [segment and segment.start for segment in segments],
        "duration": [segment and segment.duration for segment in segments],
    }


def to_items(table: pa.Table) -> tuple[Item, ...]:
    """Convert rows of `ITEMS_SCHEMA` to items, in order."""
    return tuple(_item(row) for row in table.to_pylist())


def _item(row: dict[str, Any]) -> Item:
    place: ByteRange | TableCell | None = None
    if row["offset"] is not None:
        place = ByteRange(row["offset"], row["length"])
    elif row["row_group"] is not None:
        place = TableCell(row["row_group"], row["row"], row["column"])
    return Item(
        key=row["key"],
        uri=row["uri"],
        size=row["size"],
        version=row["version"],
        sidecars=tuple(row["sidecars"]),
        place=place,
        segment=None if row["start"] is None else Segment(row["start"], row["duration"]),
        seconds=row["seconds"],
        metadata=row["metadata"],
        group=row["group"],
        role=row["role"],
        extension=row.get("extension"),
        sidecar_versions=row.get("sidecar_versions") or "",
    )


def unit_hash(table: pa.Table) -> str:
    """The hash of a unit's items: xxh3-64 of their keys and files, in hex."""
    digest = xxhash.xxh3_64()
    for name in ("key", "uri", "size", "version", "start", "duration"):
        digest.update(repr(table[name].to_pylist()).encode())
    return digest.hexdigest()
