"""The shard formats. CONTRIBUTING.md describes how to add one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from latentmill.errors import StoreError
from latentmill.store.writers import ShardWriter

Open = Callable[[Path, Mapping[str, Any]], ShardWriter]


class FormatEntry(NamedTuple):
    """A shard format: the extension of its files, and the function that opens a writer."""

    extension: str
    open: Open


def _parquet(path: Path, info: Mapping[str, Any]) -> ShardWriter:
    from latentmill.store.parquet import ParquetShardWriter

    return ParquetShardWriter(path, info)


def _webdataset(path: Path, info: Mapping[str, Any]) -> ShardWriter:
    from latentmill.store.tar import TarShardWriter

    return TarShardWriter(path)  # a tar has no place for `info`


# The functions import the writers when they are used, because readers do not need them.
SHARD_FORMATS: dict[str, FormatEntry] = {
    "parquet": FormatEntry(".parquet", _parquet),
    "webdataset": FormatEntry(".tar", _webdataset),
}


def open_writer(format_name: str, path: Path, info: Mapping[str, Any]) -> ShardWriter:
    """Open a writer for a new shard at the local `path`; StoreError if the format is unknown.

    `info` has what a reader of this file alone needs to know (model, dtype, layout). Parquet keeps
    it as file metadata.
    """
    return _entry(format_name).open(path, info)


def extension(format_name: str) -> str:
    """The extension of a format's shards; StoreError if the format is unknown."""
    return _entry(format_name).extension


def _entry(format_name: str) -> FormatEntry:
    if format_name not in SHARD_FORMATS:
        raise StoreError(
            f"Unknown shard format {format_name!r}: use one of {', '.join(sorted(SHARD_FORMATS))}."
        )
    return SHARD_FORMATS[format_name]
