"""Uploads of finished files under new names, in parts that are small enough to show progress."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
from fsspec.callbacks import Callback

PART = 5 << 20  # bytes: the minimum of S3, because s3fs sends ten parts at a time
MOST_PARTS = 10_000  # of S3
ONE_REQUEST = 10 * PART  # larger files are sent in parts


class _OnBytes(Callback):  # type: ignore[misc]
    """Calls a function whenever a client reports that bytes have been sent."""

    def __init__(self, on_bytes: Callable[[], object]) -> None:
        super().__init__()
        self._on_bytes = on_bytes

    def relative_update(self, inc: int = 1) -> None:
        self._on_bytes()

    def absolute_update(self, value: int) -> None:
        self._on_bytes()


def upload(
    fs: fsspec.AbstractFileSystem, file: Path, path: str, on_bytes: Callable[[], object]
) -> None:
    """Upload a file under a new name; FileExistsError, or HTTP status 412, if the name is taken.

    `on_bytes` is called, in any thread, whenever a part has arrived.
    """
    options: dict[str, Any] = {}
    if "s3" in fs.protocol:  # its own parts are ten times as large: hours on a slow line
        size = file.stat().st_size
        needed = size if size <= ONE_REQUEST else -(-size // MOST_PARTS)
        options = {"chunksize": max(PART, needed)}
    fs.put_file(str(file), path, callback=_OnBytes(on_bytes), mode="create", **options)
