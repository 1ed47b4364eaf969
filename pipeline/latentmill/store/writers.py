"""What writes a shard: one protocol, one file per format."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

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


def open_writer(format_name: str, path: Path, info: Mapping[str, Any]) -> ShardWriter:
    """A writer of `format_name` (`parquet` or `webdataset`) on a new local file.

    Args:
        format_name: The store's format.
        path: The file to write.
        info: What a reader of this file alone needs to know: model, dtype, layout. Parquet keeps
            it as file metadata; a tar has no place for it.
    """
    if format_name == "parquet":
        from latentmill.store.parquet import ParquetShardWriter

        return ParquetShardWriter(path, info)
    from latentmill.store.tar import TarShardWriter

    return TarShardWriter(path)
