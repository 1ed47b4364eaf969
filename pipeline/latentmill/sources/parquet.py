"""Parquet files with a column of audio, such as those that Hugging Face `datasets` writes."""

from __future__ import annotations

import contextlib
import posixpath
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pyarrow as pa

from latentmill.audio.media import path_of_file_url
from latentmill.errors import SourceError
from latentmill.sources.arrays import audio_column, is_array, is_samples
from latentmill.sources.base import Item, TableCell
from latentmill.sources.columns import (
    ROWS,
    as_json,
    bounded_rows,
    is_audio,
    is_binary,
    plain_columns,
    refuse_bombs,
)
from latentmill.sources.files import File, Place, find_files
from latentmill.sources.names import as_key, not_empty
from latentmill.sources.parquet_cells import open_table
from latentmill.storage.remote import cause_of, refuse_secrets, storage_errors

TABLES = (".parquet",)

# A column chunk with more bytes than both together holds values, whoever has written it.
_MOST_NULLS = 1 << 20
_MOST_PER_NULL = 64

_BATCH = 8  # rows of audio that are in memory at a time


class ParquetSource:
    """The rows of Parquet files: a file, a folder of files, a glob or a brace pattern.

    The audio is in a column `struct<bytes, path>`, in a column of bytes, or in columns of samples
    (see `arrays`). If the struct of a row has only a path, the item is that file. A key is the
    file's name without `.parquet`, a slash and the row's number in the file
    (`train-00000-of-00004/00000017`), or the value of `key_column`. All other columns except bytes
    and samples are metadata, and so is the audio's `path`.
    """

    def __init__(
        self, uri: str, *, audio_column: str | None = None, key_column: str | None = None
    ) -> None:
        self._place = Place(uri)
        self._audio_column = audio_column
        self._key_column = key_column
        self.uri = self._place.uri
        self.ignored: Counter[str] = Counter()

    def items(self) -> Iterator[Item]:
        """Yield the items; see `Source.items`."""
        self.ignored.clear()
        found = 0
        for file in find_files(self._place, TABLES, self.ignored):
            with table_errors(file.uri), open_table(file.uri) as table:
                for item in self._items_of(file, table):
                    found += 1
                    yield item
        if not found:
            raise SourceError(f"Source {self.uri} contains no rows: check the path.")

    def _items_of(self, file: File, table: Any) -> Iterator[Item]:
        schema = table.schema_arrow
        audio = _choose(schema, self._audio_column, file.uri)
        column = audio_column(schema, audio, file.uri)
        columns = plain_columns(schema)
        if column.kind in ("struct", "list"):
            held = (audio, f"{audio}.array", f"{audio}.sampling_rate")
            columns = [name for name in columns if name not in held]
        if self._key_column is not None and self._key_column not in columns:
            raise SourceError(
                f"{file.uri} has no key column {self._key_column}: choose one of "
                f"{', '.join(columns)}."
            )
        refuse_bombs(table, columns, file.uri)
        stem = posixpath.splitext(file.name)[0]
        number = 0
        for group in range(table.metadata.num_row_groups):
            about = table.metadata.row_group(group)
            size, empty = _mean_size(about, audio)
            if empty is None and column.kind == "file":
                empty = _has_only_nulls(table, group, audio)
            for row, metadata in enumerate(_rows(table, file.uri, group, columns, about.num_rows)):
                path = (metadata.pop(audio, None) or {}).get("path")
                elsewhere = column.kind == "file" and empty and bool(path)
                if path is not None:
                    metadata.setdefault("path", path)
                name = f"{number:08d}" if self._key_column is None else None
                yield Item(
                    key=f"{stem}/{name}" if name else self._key(metadata, file, number),
                    uri=_beside(file.uri, str(path)) if elsewhere else file.uri,
                    size=0 if elsewhere else size,
                    version="" if elsewhere else file.version,
                    place=None if elsewhere else TableCell(group, row, audio),
                    metadata=as_json(metadata),
                    extension=posixpath.splitext(str(path or ""))[1].lower().removeprefix(".")
                    or ("wav" if column.kind in ("struct", "list") else None),
                )
                number += 1

    def _key(self, metadata: dict[str, Any], file: File, number: int) -> str:
        value = metadata.get(str(self._key_column))
        if value is None or value == "":
            raise SourceError(
                f"{file.uri} has no {self._key_column} in row {number}: add it, or use keys by row "
                "number, without --key-column."
            )
        return not_empty(as_key(str(value)), file.uri, f"row {number}")


def _beside(table: str, path: str) -> str:
    """The URI of a path in a table: absolute, a URL, or relative to the table's folder."""
    if path.startswith("file://"):
        return path_of_file_url(path)
    if "://" in path or path.startswith("/"):
        refuse_secrets(f"Table {table}: URL", path, SourceError)
        return path
    protocol, mark, folder = posixpath.dirname(table).rpartition("://")
    return protocol + mark + posixpath.normpath(f"{folder}/{path}")


def _choose(schema: pa.Schema, requested: str | None, uri: str) -> str:
    """The column of audio; raises SourceError if there is none or if there are several."""
    kinds = {field.name: field.type for field in schema}
    if requested is not None:
        return requested
    structs = [name for name, kind in kinds.items() if is_audio(kind) or is_array(kind)]
    plain = [name for name, kind in kinds.items() if is_binary(kind)]
    lists = [field.name for field in schema if is_samples(field)]
    for found in (structs, plain, lists):
        if "audio" in found or len(found) == 1:
            return "audio" if "audio" in found else found[0]
        if found:
            raise SourceError(
                f"{uri} has several audio columns, {', '.join(found)}: choose one with "
                "--audio-column."
            )
    raise SourceError(
        f"{uri} has no audio column, only {', '.join(kinds)}: check the path or set --audio-column."
    )


def has_audio(schema: pa.Schema) -> bool:
    """Whether a table contains audio; otherwise it is a manifest."""
    return any(
        is_audio(field.type) or is_binary(field.type) or is_array(field.type) or is_samples(field)
        for field in schema
    )


@contextlib.contextmanager
def table_errors(uri: str) -> Iterator[None]:
    """Convert errors of reading a Parquet file to a SourceError with its URI."""
    try:
        yield
    except (*storage_errors(), pa.ArrowException, ValueError) as error:
        # ValueError: text that is not UTF-8, or fsspec's http with a server without ranges.
        cause = cause_of(error).split(". ")[0]  # Arrow's messages are long
        raise SourceError(f"Table {uri} cannot be read: {cause}.") from error


def _rows(
    table: Any, uri: str, group: int, columns: list[str], rows: int
) -> Iterator[dict[str, Any]]:
    if not columns:
        yield from ({} for _ in range(rows))
        return
    yield from bounded_rows(
        table.iter_batches(ROWS, row_groups=[group], columns=columns, use_threads=False), uri
    )


def _mean_size(group: Any, column: str) -> tuple[int, bool | None]:
    """Average bytes of a cell in a row group, and whether all cells are empty.

    The footer has only these totals. None: only reading the cells, which are small, can tell.
    """
    for index in range(group.num_columns):
        chunk = group.column(index)
        path = chunk.path_in_schema
        if (
            path in (column, f"{column}.bytes")
            or path.startswith((f"{column}.array.", f"{column}.list."))
        ) and (group.num_rows):
            size = int(chunk.total_compressed_size // group.num_rows)
            if chunk.statistics is not None and chunk.statistics.has_null_count:
                return size, chunk.statistics.null_count == group.num_rows
            limit = _MOST_NULLS + _MOST_PER_NULL * group.num_rows
            return size, False if chunk.total_uncompressed_size > limit else None
    return 0, False


def _has_only_nulls(table: Any, group: int, column: str) -> bool:
    """Whether no row of a row group has bytes; reads up to the first that has."""
    batches = table.iter_batches(
        _BATCH, row_groups=[group], columns=[f"{column}.bytes"], use_threads=False
    )
    return all(cells.flatten()[0].null_count == len(cells) for (cells,) in batches)
