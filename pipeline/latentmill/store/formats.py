"""The shard formats. A new format needs a writer, an entry here and one in `ShardFormat`."""

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


# Imported when used: readers do not need them.
WRITERS: dict[str, Callable[[Path, Mapping[str, Any]], ShardWriter]] = {
    "parquet": _parquet,
    "webdataset": _webdataset,
}


def open_writer(format_name: str, path: Path, info: Mapping[str, Any]) -> ShardWriter:
    """Open a writer for a new shard at the local `path`; StoreError if the format is unknown.

    `info` has what a reader of this file alone needs to know (model, dtype, layout). Parquet keeps
    it as file metadata.
    """
    if format_name not in WRITERS:
        raise StoreError(
            f"Unknown shard format {format_name!r}: use one of {', '.join(sorted(WRITERS))}."
        )
    return WRITERS[format_name](path, info)
