"""The protocol of shard writers. `formats.py` lists the formats."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from latentmill.record import Record


@dataclass(frozen=True)
class Location:
    """Position of one record in its shard: the latent's bytes and, in a tar, the JSON member."""

    offset: int
    length: int
    fields_offset: int | None = None
    fields_length: int | None = None


class ShardWriter(Protocol):
    """Writes records to one local file, in the order of the `add` calls.

    The same records must result in the same bytes. Not thread-safe.
    """

    max_latent_bytes: int

    def add(self, record: Record) -> None:
        """Add a record, whose latent has at most `max_latent_bytes`.

        Raises:
            OSError: Writing fails, for example because the disk is full.
        """
        ...

    def close(self) -> list[Location]:
        """Complete the file and return the location of every record, in order.

        Raises:
            OSError: Writing fails, for example because the disk is full.
        """
        ...

    def abort(self) -> None:
        """Close and remove the file in any state. Never raises."""
        ...
