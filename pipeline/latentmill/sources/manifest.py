"""A manifest: one row per recording or segment; the other columns are metadata."""

from __future__ import annotations

import csv
import dataclasses
import json
import lzma
import math
import os
import posixpath
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from latentmill.audio.media import path_of_file_url
from latentmill.errors import SourceError
from latentmill.sources import lhotse
from latentmill.sources.address import segment_text
from latentmill.sources.base import Item, Segment
from latentmill.sources.columns import (
    METADATA_LIMIT,
    ROWS,
    as_json,
    bounded_rows,
    find_column,
    is_text,
    plain_columns,
    refuse_bombs,
)
from latentmill.sources.files import Place, check_name
from latentmill.sources.lines import BoundedLines, open_text
from latentmill.sources.metadata import MAX_NESTING, is_too_deep
from latentmill.sources.names import as_key, not_empty
from latentmill.sources.parquet import table_errors
from latentmill.sources.parquet_cells import open_table
from latentmill.storage.remote import cause_of, refuse_secrets, storage_errors
from latentmill.text.redact import may_hold_secrets

FORMATS = {".csv": "csv", ".tsv": "tsv", ".parquet": "parquet"}
FORMATS |= dict.fromkeys((".jsonl", ".ndjson", ".json"), "jsonl")

PATHS: tuple[str, ...] = ("audio_filepath", "audio_path", "path", "filepath", "file_path")
PATHS += ("file", "filename", "file_name", "url", "uri", "audio", "wav")
STARTS = ("start", "offset", "begin", "start_time", "start_seconds")
DURATIONS = ("duration", "dur", "length", "duration_seconds", "seconds")
KEYS = ("key", "id")
ENDS = ("end", "stop", "end_time", "end_seconds")

_BROKEN: tuple[type[Exception], ...] = (EOFError, zlib.error, lzma.LZMAError)
"""Errors of truncated or damaged compressed files, apart from OSError."""

Row = tuple[str, dict[str, Any]]
"""The position of a row, such as `line 7`, and its cells."""

_Builder = Callable[[dict[str, Any], str], Item | None]

_KINDS = {list: "a list", dict: "an object", bool: "true or false"}

_NUMBER = re.compile(r"-?(0|[1-9][0-9]{0,15})(\.[0-9]+)?([eE][-+]?[0-9]{1,2})?")


@dataclass(frozen=True)
class _RowColumns:
    """Names of the columns of rows; `key` is None if it is the path."""

    not_metadata: frozenset[str]
    path: str
    start: str | None
    duration: str | None
    key: str | None


@dataclass(frozen=True)
class ManifestColumns:
    """Names of a manifest's columns; None: one of the usual names."""

    path: str | None = None
    start: str | None = None
    duration: str | None = None
    key: str | None = None


class ManifestSource:
    """The rows of a CSV, TSV, JSONL or Parquet file; CSV, TSV and JSONL may be compressed.

    A path is absolute, a URL, or relative to the manifest. A row with a start is a segment; without
    a duration it reaches to the end of the recording. A duration without a start is the length of
    the recording. A key is the value of a column `key` or `id`, or else the path relative to the
    manifest without its extension, followed by the start and end of a segment:
    `talks/one#12.5-17.25`. Lhotse cuts and NeMo manifests need no conversion.
    """

    def __init__(
        self, uri: str, columns: ManifestColumns = ManifestColumns(), what: str = "Manifest"
    ) -> None:
        self._place = Place(uri)
        self._columns = columns
        self.uri = self._place.uri
        self._name = f"{what} {self.uri}"  # in messages
        self.ignored: Counter[str] = Counter()
        self._folder = posixpath.dirname(self.uri)
        self._texts = manifest_format(self.uri) in ("csv", "tsv")  # every value is text
        self._below = self._folder.rstrip("/") + "/"

    def items(self) -> Iterator[Item]:
        """Yield the items; see `Source.items`."""
        self.ignored.clear()
        check_name(self._folder, self.uri)
        found = 0
        for item in self._items():
            found += 1
            yield item
        if not found:
            raise SourceError(
                f"{self._name} has no rows with a path: check the file and --path-column."
            )

    def rows(self) -> Iterator[Row]:
        """Yield the rows. The cells of CSV and TSV are text; `cell_value` converts them.

        Raises SourceError if the file cannot be read or is invalid.
        """
        read = {"csv": self._csv, "tsv": self._csv, "jsonl": self._jsonl, "parquet": self._parquet}
        try:
            if self._place.kind() != "file":
                raise SourceError(f"{self._name} does not exist or is not a file: check the path.")
            yield from read[manifest_format(self.uri) or "jsonl"]()
        except (*storage_errors(), *_BROKEN) as error:
            raise SourceError(f"{self._name} cannot be read: {cause_of(error)}.") from error
        except UnicodeDecodeError as error:
            raise SourceError(f"{self._name} is not UTF-8 text: convert it to UTF-8.") from error

    def _items(self) -> Iterator[Item]:
        builders: dict[tuple[str, ...], _Builder] = {}
        for place, row in self.rows():
            names = tuple(row)  # JSON rows may have different fields
            if names not in builders:
                builders[names] = self._builder(row, required=not builders)
            item = builders[names](row, place)
            if item is not None:
                yield item

    def _builder(self, row: dict[str, Any], *, required: bool) -> _Builder:
        """The function that converts rows with these fields to items."""
        if lhotse.is_cut(row):
            return self._item_of_cut
        found = self._find_columns(row, required=required)
        return self._count_without_path if found is None else partial(self._item, found)

    def _find_columns(self, row: dict[str, Any], *, required: bool) -> _RowColumns | None:
        """The columns of rows with these fields; None without paths, if they are not `required`."""
        names, where = list(row), self._name
        given = {
            name: value
            for name, value in dataclasses.asdict(self._columns).items()
            if required or value in row
        }
        requested = ManifestColumns(**given)
        path = find_column(names, requested.path, PATHS, "path", where)
        if path is None:
            if not required:
                return None
            raise SourceError(
                f"{where} has no path column: set --path-column to one of {', '.join(names)}."
            )
        start = find_column(names, requested.start, STARTS, "start", where)
        duration = find_column(names, requested.duration, DURATIONS, "duration", where)
        key = find_column(names, requested.key, KEYS, "key", where)
        key = self._columns.key or key  # with --key-column, every row must have it
        end = find_column(names, None, ENDS, "end", where)
        if start and end and not duration:  # else the segment would reach to the recording's end
            raise SourceError(
                f"{where} gives the ends of segments in column {end}, which is not supported: "
                "replace it with a column duration."
            )
        not_metadata = frozenset(name for name in (path, start, duration) if name is not None)
        return _RowColumns(not_metadata, path, start, duration, key if key != path else None)

    def _item(self, columns: _RowColumns, row: dict[str, Any], place: str) -> Item | None:
        """The item of a row."""
        value = row[columns.path]
        if isinstance(value, dict):  # a Hugging Face audio column without bytes
            value = value.get("path")
        if value is None or value == "":
            return self._count_without_path(row, place)
        if type(value) in _KINDS:
            raise SourceError(
                f"{self._name}: column {columns.path} holds {_KINDS[type(value)]} in {place}, not "
                "a path: set --path-column to the column of paths."
            )
        start, duration = columns.start, columns.duration
        begin = None if start is None else self._seconds(row, start, place)
        length = None if duration is None else self._seconds(row, duration, place)
        segment = None if begin is None else Segment(begin, length)
        uri, name = self._locate(str(value), place)
        values = {n: cell_value(v) for n, v in row.items()} if self._texts else row
        return Item(
            key=self._key(row, columns.key, name, segment, place),
            uri=uri,
            size=0,
            version="",
            segment=segment,
            seconds=length,
            metadata=as_json(values, columns.not_metadata),
        )

    def _count_without_path(self, row: dict[str, Any], place: str) -> Item | None:
        self.ignored["rows without a path"] += 1
        return None

    def _item_of_cut(self, row: dict[str, Any], place: str) -> Item | None:
        try:
            cut = lhotse.read_cut(row)
        except lhotse.Unusable as error:
            self.ignored[str(error)] += 1
            return None
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise SourceError(
                f"{self._name} has an invalid Lhotse cut in {place}: correct or remove it."
            ) from error
        uri, _ = self._locate(cut.path, place)
        return Item(
            key=not_empty(as_key(cut.id), self._name, place),
            uri=uri,
            size=0,
            version="",
            segment=cut.segment,
            seconds=cut.duration,
            metadata=as_json(cut.metadata),
        )

    def _key(
        self,
        row: dict[str, Any],
        column: str | None,
        name: str,
        segment: Segment | None,
        place: str,
    ) -> str:
        if column is None:
            key = name if segment is None else f"{name}#{segment_text(segment, '-')}"
            return not_empty(key, self._name, place)
        value = row.get(column)
        if value is None or value == "":
            raise SourceError(f"{self._name} has no {column} in {place}: add it or remove the row.")
        return not_empty(as_key(str(value)), self._name, place)

    def _locate(self, path: str, place: str) -> tuple[str, str]:
        """A recording's URI and its path relative to the manifest without its extension."""
        _, is_url, rest = path.partition("://")
        if (is_url and "::" in path) or "\0" in path or not is_text(path):
            raise SourceError(
                f"{self._name} has an invalid path in {place}: {path!r} is not a plain "
                "path or URL; correct it."
            )
        marked = "?" in path or "@" in path or ";" in path or "#" in path
        if marked or path.startswith("//") or (is_url and may_hold_secrets(rest)):
            refuse_secrets(f"{self._name}, {place}: URL", path, SourceError)
        if path.startswith("file://"):
            path = path_of_file_url(path)
        if self._place.local and path.startswith("~"):  # may also begin the name of a file
            expanded = os.path.expanduser(path)  # noqa: PTH111
            path = expanded if expanded.startswith("/") else path
        if "://" in path:
            uri = path
        elif path.startswith("/"):
            uri = posixpath.normpath(path)
        else:
            uri = self._beside(path)
        name = uri.removeprefix(self._below)
        if name == uri:
            name = (uri.partition("://")[2] or uri).lstrip("/")
        # As posixpath.splitext, which takes three times as long.
        stem, _, extension = name.rpartition(".")
        if len(extension) > 5 or "/" in extension or not stem.rpartition("/")[2].strip("."):
            stem = name
        return uri, as_key(stem)

    def _beside(self, path: str) -> str:
        """A path relative to the manifest's folder."""
        if ".." not in path and "./" not in path:
            return f"{self._folder}/{path}"
        protocol, mark, folder = self._folder.rpartition("://")
        return protocol + mark + posixpath.normpath(f"{folder}/{path}")

    def _seconds(self, row: dict[str, Any], column: str, place: str) -> float | None:
        value = row.get(column)
        if value is None or value == "":
            return None
        try:
            seconds = float(value)
        except (TypeError, ValueError):
            seconds = math.nan
        if not 0 <= seconds < 1e9:
            raise SourceError(
                f"{self._name} has an invalid {column} in {place}: {value!r} is not a "
                "number of seconds; correct it."
            )
        return round(seconds, 6)

    def _csv(self) -> Iterator[Row]:
        """Rows of strings: keys and paths may look like numbers."""
        tabs = manifest_format(self.uri) == "tsv"
        # In a TSV each line is a row: unclosed quotes are common, for example in Common Voice.
        style: dict[str, Any] = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if tabs else {}
        csv.field_size_limit(METADATA_LIMIT)  # the default is 128 KiB
        with open_text(self._place.fs, self._place.path) as file:
            lines = BoundedLines(file, self._name)
            reader = csv.reader(lines, strict=True, **style)
            names: list[str] | None = None
            line = 1  # on which the row begins; quoted cells may span lines
            try:
                for cells in reader:
                    lines.next_row()
                    row = list(map(_unquoted, cells)) if tabs else cells
                    if names is None and row:
                        names = self._without_repeats(row)
                    elif names is not None and row:
                        if len(row) > len(names):
                            raise csv.Error(f"{len(row)} fields, but the header has {len(names)}")
                        missing = [None] * (len(names) - len(row))
                        yield f"line {line}", dict(zip(names, [*row, *missing], strict=True))
                    line = reader.line_num + 1
            except csv.Error as error:
                raise SourceError(
                    f"{self._name} is not valid CSV in line {line}: {error}; correct it."
                ) from error

    def _without_repeats(self, names: list[str]) -> list[str]:
        repeated = [name for name, uses in Counter(filter(None, names)).items() if uses > 1]
        if repeated:
            raise SourceError(
                f"{self._name} has several columns named {repeated[0]}: rename them, or remove all "
                "but one."
            )
        return names

    def _jsonl(self) -> Iterator[Row]:
        with open_text(self._place.fs, self._place.path) as file:
            lines = BoundedLines(file, self._name)
            for number, line in enumerate(lines, 1):
                lines.next_row()
                if not line.strip():
                    continue
                try:
                    row = json.loads(line)
                except (ValueError, RecursionError) as error:
                    raise SourceError(
                        f"{self._name} is not valid JSON in line {number}: write one object "
                        "per line."
                    ) from error
                if not isinstance(row, dict):
                    raise SourceError(
                        f"{self._name}: line {number} is not a JSON object: write one "
                        "object per line."
                    )
                if is_too_deep(row):
                    raise SourceError(
                        f"{self._name}: the object in line {number} is nested more than "
                        f"{MAX_NESTING} levels deep: simplify or remove it."
                    )
                yield f"line {number}", row

    def _parquet(self) -> Iterator[Row]:
        with table_errors(self.uri), open_table(self.uri) as table:
            columns = plain_columns(table.schema_arrow)
            refuse_bombs(table, columns, self.uri)
            batches = table.iter_batches(ROWS, columns=columns, use_threads=False)
            for number, row in enumerate(bounded_rows(batches, self.uri), 1):
                yield f"row {number}", row


def manifest_format(uri: str) -> str | None:
    """`csv`, `tsv`, `jsonl` or `parquet` by the extension of a file, or else None."""
    name = re.sub(r"\.(gz|bz2|xz|zst)$", "", uri.lower())
    return FORMATS.get(posixpath.splitext(name)[1])


def _unquoted(cell: str) -> str:
    """A cell of a TSV without the quotes around it."""
    if len(cell) < 2 or not cell[0] == cell[-1] == '"':
        return cell
    return cell[1:-1].replace('""', '"')


def cell_value(value: str | None) -> Any:
    """The value of a CSV cell: a number if it is a valid one, None if it is empty."""
    if value is None or value == "":
        return None
    if not _NUMBER.fullmatch(value):
        return value
    return float(value) if set(value) & set(".eE") else int(value)
