"""Reads of the Hugging Face hub: exact ranges, many at the same time.

By default, fsspec's file system of the hub reads ranges one after the other, and 5 MiB more than
each range. Each file that it writes is a commit, so no store is written there.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import fsspec

from latentmill.errors import ConfigError
from latentmill.storage.remote import protocol_of, status_of, storage_errors

IN_FLIGHT = 16


def is_hub(fs: fsspec.AbstractFileSystem) -> bool:
    """Whether a file system is that of the hub."""
    return "hf" in ((fs.protocol,) if isinstance(fs.protocol, str) else fs.protocol)


def refuse_store(url: str) -> None:
    """Raise ConfigError if a store that is to be written or changed is on the hub."""
    if protocol_of(url) == "hf":
        raise ConfigError(
            f"{url} is on the Hugging Face hub, where each write is a commit: write the store to a "
            f"folder or a bucket, then run `latentmill push STORE {url}`."
        )


def cat_file(fs: fsspec.AbstractFileSystem, path: str, start: int, end: int) -> bytes:
    """Read the bytes from `start` to `end`.

    FileNotFoundError also for a file that was removed since its folder was listed.
    """
    try:
        return bytes(fs.cat_file(path, start=start, end=end, cache_type="none"))
    except storage_errors() as error:
        if status_of(error) == 404 and not isinstance(error, FileNotFoundError):
            raise FileNotFoundError(path) from error
        raise


def cat_ranges(
    fs: fsspec.AbstractFileSystem,
    paths: Sequence[str],
    starts: Sequence[int],
    ends: Sequence[int],
) -> list[Any]:
    """Like `fs.cat_ranges` with `on_error="return"`."""

    def read(path: str, start: int, end: int) -> bytes | Exception:
        try:
            return cat_file(fs, path, start, end)
        except storage_errors() as error:
            return error

    with ThreadPoolExecutor(min(IN_FLIGHT, len(paths)), thread_name_prefix="hub") as pool:
        return list(pool.map(read, paths, starts, ends))
