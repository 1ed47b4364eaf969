"""The protocol of all sources. A complete example, which reads WAV files listed in a text file:

    from collections import Counter
    from pathlib import Path
    from latentmill.sources.base import Item

    class ListedFiles:
        def __init__(self, uri):
            self.uri = str(Path(uri).absolute())
            self.ignored = Counter()

        def items(self):
            for line in Path(self.uri).read_text().splitlines():
                path = Path(self.uri).parent / line
                if path.suffix == ".wav":
                    stat = path.stat()
                    yield Item(line, str(path), stat.st_size, str(stat.st_mtime_ns))
                else:
                    self.ignored[path.suffix] += 1

CONTRIBUTING.md describes how to register a source.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, Protocol

from latentmill.sources.names import as_text

SourceType = Literal["folder", "manifest", "webdataset", "parquet"]


@dataclass(frozen=True)
class Segment:
    """A part of a longer recording.

    Attributes:
        start: Seconds from the beginning of the recording.
        duration: Seconds; None: to the end.
    """

    start: float
    duration: float | None = None


@dataclass(frozen=True)
class ByteRange:
    """Audio that is a range of bytes in a file: a member of an uncompressed tar."""

    offset: int
    size: int


@dataclass(frozen=True)
class TableCell:
    """Audio that is one value of a Parquet file: row `row` of row group `row_group`."""

    row_group: int
    row: int
    column: str


@dataclass(frozen=True)
class Item:
    """One recording in a source.

    Attributes:
        key: Unique and stable name, relative to the source, with `/` between parts.
        uri: The file that holds its bytes: an absolute local path or an fsspec URL.
        size: Bytes of the encoded audio according to the listing; 0 if unknown. For a cell of a
            table, the average in its row group.
        version: A value that changes when the file at `uri` changes. Local files: the modification
            time, `str(st_mtime_ns)`, which is compared when the file is read. Other storage: for
            example the ETag (`current_version` and `version_of` in `sources/files.py`).
        sidecars: URIs of the files that hold its metadata, in a stable order.
        place: The position of its bytes in the file; None: they are the whole file.
        segment: The part of the recording to encode; None: all of it.
        seconds: Length of the item's audio, if the source knows it without loading it.
        metadata: Metadata from the source itself (manifest columns, tar members): a JSON object.
        group: Name of its group (the song that a stem belongs to), if known; see
            `sources/group.py`.
        role: Its role in the group (`drums`, `vocals`), if known.
        extension: In a tar or a table, the extension of its own name, such as `flac`. Planning
            uses it to estimate lengths; it is not stored.
        estimate: Approximate length in seconds according to its container (from a bit rate, or in
            milliseconds). Planning uses it to estimate lengths; it is not stored.
        sidecar_versions: A value that changes when a sidecar changes; empty if unknown.
    """

    key: str
    uri: str
    size: int
    version: str
    sidecars: tuple[str, ...] = ()
    place: ByteRange | TableCell | None = None
    segment: Segment | None = None
    seconds: float | None = None
    metadata: str = "{}"
    group: str | None = None
    role: str | None = None
    extension: str | None = None
    estimate: float | None = None
    sidecar_versions: str = ""


def known_seconds(item: Item) -> float | None:
    """An item's length according to its source, or None if it is missing or invalid."""
    for seconds in (item.seconds, item.segment.duration if item.segment else None):
        if seconds is not None and 0 <= seconds < math.inf:
            return seconds
    return None


def ignored_by(source: Source) -> dict[str, int]:
    """What a source has ignored, sorted, with the names as valid text."""
    counts: Counter[str] = Counter()
    for reason, count in source.ignored.items():
        counts[as_text(reason)] += count
    return dict(sorted(counts.items()))


class Source(Protocol):
    """A source of audio. It must be deterministic: the same content gives the same items.

    Attributes:
        uri: SOURCE as the user typed it, as an absolute path or URL.
        ignored: Number of files or rows that are not items, by extension or reason; complete when
            `items` has ended.
    """

    uri: str
    ignored: Counter[str]

    def items(self) -> Iterator[Item]:
        """Yield the items in any order, with bounded memory.

        The planner sorts them and refuses duplicate keys.

        Raises:
            SourceError: The source is missing, cannot be read, or contains no audio.
        """
        ...
