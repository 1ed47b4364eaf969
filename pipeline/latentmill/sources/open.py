"""Opens the source that a SOURCE argument refers to."""

from __future__ import annotations

import os
import posixpath
import re
from collections.abc import Callable, Iterable

import braceexpand

from latentmill.errors import ConfigError, SourceError
from latentmill.sources.base import Item, Source, SourceType
from latentmill.sources.files import Place
from latentmill.sources.folder import FolderSource
from latentmill.sources.group import GroupedSource
from latentmill.sources.manifest import ManifestColumns, ManifestSource, manifest_format
from latentmill.sources.parquet import ParquetSource, has_audio, table_errors
from latentmill.sources.parquet_cells import open_table
from latentmill.sources.settings import Setting, SourceSettings, option
from latentmill.sources.webdataset import WebDatasetSource

_TARS = (".tar", ".tgz", ".tar.gz", ".tar.bz2", ".tar.xz", ".tar.zst")


# How each type of source is opened. Add new types here and to `SourceType`.
SOURCES: dict[SourceType, Callable[[SourceSettings], Source]] = {
    "folder": lambda given: FolderSource(
        given.source, given.extensions, include=given.include, exclude=given.exclude
    ),
    "manifest": lambda given: ManifestSource(
        given.source,
        ManifestColumns(
            given.path_column, given.start_column, given.duration_column, given.key_column
        ),
    ),
    "webdataset": lambda given: WebDatasetSource(given.source, given.extensions),
    "parquet": lambda given: ParquetSource(
        given.source, audio_column=given.audio_column, key_column=given.key_column
    ),
}


def open_source(given: SourceSettings) -> Source:
    """Open the source of some settings, without listing it.

    Raises SourceError if it cannot be opened, and ConfigError if a setting is wrong or has no
    effect on this type of source.
    """
    kind = given.source_type or source_type(given.source)
    for name, field in SourceSettings.model_fields.items():
        types = Setting.of(field).sources if name in given.model_fields_set else ()
        if types and kind not in types and getattr(given, name) not in (field.default, ""):
            raise ConfigError(
                f"{option(name)} has no effect on a source of type {kind}, only on "
                f"{' and '.join(types)}: remove it, or set --source-type."
            )
    source = SOURCES[kind](given)
    return source if given.group_by is None else GroupedSource(source, given.group_by)


def source_type(uri: str) -> SourceType:
    """The type of a source by its name; for a single Parquet file, by its schema."""
    name = uri.lower()
    if name.endswith(_TARS):
        return "webdataset"
    if name.endswith(".parquet"):
        return "parquet" if any(mark in name for mark in "*?[{") else _by_schema(uri)
    if manifest_format(uri) is not None and not uri.endswith("/"):
        # The name of a folder may look like a manifest's.
        return "manifest" if Place(uri).kind() != "folder" else "folder"
    return "parquet" if name.startswith("hf://datasets/") else "folder"


def _by_schema(uri: str) -> SourceType:
    place = Place(uri)
    kind = place.kind()
    if kind == "nothing":
        raise SourceError(f"Source {place.uri} does not exist: check the path.")
    if kind == "folder":
        return "parquet"
    with table_errors(place.uri), open_table(place.uri) as table:
        return "parquet" if has_audio(table.schema_arrow) else "manifest"


def is_there(uri: str) -> bool:
    """Whether a source still exists.

    For a pattern, checks the folder before its wildcards and the first file of its braces, because
    web servers may deny access to folders.
    """
    place = Place(uri)
    if place.kind() != "nothing":
        return True
    fixed = re.split(r"[*?\[{]", place.path, maxsplit=1)[0]
    if fixed == place.path:
        return False
    first = next(iter(braceexpand.braceexpand(place.path)))
    return bool(place.fs.exists(posixpath.dirname(fixed)) or place.fs.exists(first))


def has_any(uri: str, items: Iterable[Item]) -> bool:
    """Whether a source on this machine has the file of any of some items; True for other sources.

    Files that manifests and tables refer to are not looked up: only the workers may have access to
    them.
    """
    place = Place(uri)
    if not place.local or place.kind() == "file":
        return True
    folder = os.path.abspath(re.split(r"[*?\[{]", place.path, maxsplit=1)[0])  # noqa: PTH100
    return any(not item.uri.startswith(folder) or os.access(item.uri, os.F_OK) for item in items)
