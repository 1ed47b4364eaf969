"""The protocol of every source. A complete one, of the WAV files that a text file lists:

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

CONTRIBUTING.md says where it is registered.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, Protocol

SourceType = Literal["folder", "manifest", "webdataset", "parquet"]


@dataclass(frozen=True)
class Segment:
    """A part of a longer recording, in seconds of its own time.

    Attributes:
        start: Where it begins.
        duration: How long it is; None: to the end.
    """

    start: float
    duration: float | None = None


@dataclass(frozen=True)
class ByteRange:
    """Audio that is a run of bytes inside a file: a member of an uncompressed tar."""

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
        key: Unique and stable name, relative to the source, `/` between parts.
        uri: The file that holds its bytes: an absolute local path or an fsspec URL.
        size: Bytes of the encoded audio, as the listing gave them; 0 if it did not say. Of a
            table's cell the average in its row group.
        version: Whatever changes when the file at `uri` does (etag, or modification time).
        sidecars: URIs of the files that carry its metadata, in a stable order.
        place: Where in the file its bytes are; None: they are the whole file.
        segment: The part of the recording that is meant; None: all of it.
        seconds: Length of the item's audio where the source knows it without decoding.
        metadata: What the source itself says of it (manifest columns, tar members): a JSON object.
        group: What belongs together (the song of a stem), if known; see `sources/group.py`.
        role: What the item is in its group (`drums`, `vocals`), if known.
        extension: Inside a tar or a table its own name's, such as `flac`. It serves to guess
            lengths while a plan is made, and is not stored.
        estimate: Its length in seconds as its container says it roughly (by a bit rate, or in
            milliseconds). It serves as `extension` does.
        sidecar_versions: Whatever changes when one of those files does; empty if nobody knows.
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


class Source(Protocol):
    """Where audio comes from. Must be deterministic: the same content gives the same items.

    Attributes:
        uri: What the user named, as an absolute path or URL.
        ignored: Files or rows that are no items, counted by extension or reason; complete when
            `items` has ended.
    """

    uri: str
    ignored: Counter[str]

    def items(self) -> Iterator[Item]:
        """Stream the items, in any order, with bounded memory.

        The planner sorts them, and refuses a key that comes twice.

        Raises:
            SourceError: The source is missing, cannot be read, or holds no audio.
        """
        ...
