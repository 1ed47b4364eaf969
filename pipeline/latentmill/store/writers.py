"""What writes a shard: the protocol. `formats.py` lists the formats."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from latentmill.record import Record


@dataclass(frozen=True)
class Location:
    """Where one record lies in its shard: its latent's bytes, and its JSON member in a tar."""

    offset: int
    length: int
    fields_offset: int | None = None
    fields_length: int | None = None


class ShardWriter(Protocol):
    """Writes records to one local file, in the order in which they come.

    The same records must give the same bytes. Not thread-safe.
    """

    max_latent_bytes: int

    def add(self, record: Record) -> None:
        """Take a record; its latent has at most `max_latent_bytes`.

        Raises:
            OSError: The disk is full or gone.
        """
        ...

    def close(self) -> list[Location]:
        """Complete the file; give every record's location, in order.

        Raises:
            OSError: The disk is full or gone.
        """
        ...

    def abort(self) -> None:
        """Let go of the file, whatever state it is in, and remove it. Raises nothing."""
        ...
