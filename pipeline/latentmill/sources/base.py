"""What every source gives: items in a stable order."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class Item:
    """One recording in a source.

    Attributes:
        key: Unique and stable name, relative to the source, `/` between parts.
        uri: Where its bytes are: an absolute local path or an fsspec URL.
        size: Bytes of the audio file, as the listing gave them.
        version: Whatever changes when the file does (etag, or modification time).
        sidecars: URIs of the files that carry its metadata, in a stable order.
    """

    key: str
    uri: str
    size: int
    version: str
    sidecars: tuple[str, ...] = ()


@dataclass(frozen=True)
class Listing:
    """What a source found: its items, and how many other files it left alone, by extension."""

    items: tuple[Item, ...]
    ignored: dict[str, int]


class Source(Protocol):
    """Where audio comes from. Must be deterministic: the same content gives the same items."""

    uri: str

    def list(self) -> Listing:
        """List the items, sorted by key, each key once.

        Raises:
            SourceError: The source is missing, cannot be read, or holds no audio.
        """
        ...
