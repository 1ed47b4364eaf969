"""The formats of a shard. A new one is a writer, and a line here and in `ShardFormat`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from latentmill.errors import StoreError
from latentmill.store.writers import ShardWriter


def _parquet(path: Path, info: Mapping[str, Any]) -> ShardWriter:
    from latentmill.store.parquet import ParquetShardWriter

    return ParquetShardWriter(path, info)


def _webdataset(path: Path, info: Mapping[str, Any]) -> ShardWriter:
    from latentmill.store.tar import TarShardWriter

    return TarShardWriter(path)  # a tar has no place for `info`


# Imported where they are used: readers need none of them.
WRITERS: dict[str, Callable[[Path, Mapping[str, Any]], ShardWriter]] = {
    "parquet": _parquet,
    "webdataset": _webdataset,
}


def open_writer(format_name: str, path: Path, info: Mapping[str, Any]) -> ShardWriter:
    """A writer of a shard in this format, on a new local file.

    Args:
        format_name: The store's format: a name in `WRITERS`.
        path: The file to write.
        info: What a reader of this file alone needs to know: model, dtype, layout. Parquet keeps
            it as file metadata.

    Raises:
        StoreError: There is no such format.
    """
    if format_name not in WRITERS:
        raise StoreError(
            f"Unknown shard format {format_name!r}: use one of {', '.join(sorted(WRITERS))}."
        )
    return WRITERS[format_name](path, info)
