"""Reads lines of a text file that may be hostile: a few compressed bytes may be one huge line."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from typing import TextIO

import fsspec
import pyarrow as pa
from fsspec.utils import infer_compression

from latentmill.errors import SourceError
from latentmill.sources.columns import METADATA_LIMIT


@contextlib.contextmanager
def open_text(fs: fsspec.AbstractFileSystem, path: str) -> Iterator[TextIO]:
    """Open UTF-8 text that may be compressed, according to the extension of its name."""
    zstd = path.lower().endswith(".zst")  # fsspec needs another package for it
    compression = None if zstd else infer_compression(path)
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(fsspec.core.OpenFile(fs, path, "rb", compression))
        if zstd:
            file = stack.enter_context(pa.CompressedInputStream(file, "zstd"))
        yield stack.enter_context(io.TextIOWrapper(file, encoding="utf-8-sig", newline=""))


class BoundedLines:
    """The lines of a manifest whose rows have at most `METADATA_LIMIT` characters.

    A row of a CSV file may span lines; the caller calls `next_row` after each row.
    """

    def __init__(self, file: TextIO, name: str) -> None:
        self._file, self._name = file, name
        self._number = 0
        self._left = METADATA_LIMIT

    def next_row(self) -> None:
        """Allow the next row its full length."""
        self._left = METADATA_LIMIT

    def __iter__(self) -> Iterator[str]:
        while line := self._file.readline(self._left + 1):
            self._number += 1
            self._left -= len(line)
            if self._left < 0:
                raise SourceError(
                    f"{self._name}: the row at line {self._number} is longer than "
                    f"{METADATA_LIMIT >> 20} MiB: shorten or remove it."
                )
            yield line
