"""Which source a SOURCE argument means."""

from __future__ import annotations

import posixpath
import re
from typing import TYPE_CHECKING, Any

import braceexpand

from latentmill.errors import ConfigError, SourceError
from latentmill.sources.base import Source, SourceType
from latentmill.sources.cells import open_table
from latentmill.sources.files import Place
from latentmill.sources.folder import FolderSource
from latentmill.sources.group import GroupedSource
from latentmill.sources.manifest import Columns, ManifestSource, manifest_format
from latentmill.sources.parquet import ParquetSource, has_audio, table_errors
from latentmill.sources.webdataset import WebDatasetSource

if TYPE_CHECKING:
    from latentmill.config import RunConfig

# Settings that choose the items of a plan, which is frozen: a resume takes them from there.
SOURCE_SETTINGS = frozenset(
    {
        "source_type",
        "include",
        "exclude",
        "path_column",
        "start_column",
        "duration_column",
        "key_column",
        "audio_column",
        "group_by",
    }
)

_TARS = (".tar", ".tgz", ".tar.gz", ".tar.bz2", ".tar.xz", ".tar.zst")


def open_source(config: RunConfig) -> Source:
    """The source that a configuration names. Nothing is listed yet.

    Raises:
        SourceError: It cannot be opened.
        ConfigError: A setting of it is wrong, or has no effect on this type of source.
    """
    kind = config.source_type or source_type(config.source)
    _refuse_unused(config, kind)
    source: Source
    if kind == "manifest":
        columns = Columns(
            config.path_column, config.start_column, config.duration_column, config.key_column
        )
        source = ManifestSource(config.source, columns)
    elif kind == "webdataset":
        source = WebDatasetSource(config.source, config.extensions)
    elif kind == "parquet":
        source = ParquetSource(
            config.source, audio_column=config.audio_column, key_column=config.key_column
        )
    else:
        source = FolderSource(
            config.source, config.extensions, include=config.include, exclude=config.exclude
        )
    return source if config.group_by is None else GroupedSource(source, config.group_by)


def source_type(uri: str) -> SourceType:
    """The type of a source by its name; of one Parquet file by its schema."""
    name = uri.lower()
    if name.endswith(_TARS):
        return "webdataset"
    if name.endswith(".parquet"):
        return "parquet" if any(mark in name for mark in "*?[{") else _by_schema(uri)
    if manifest_format(uri) is not None and not uri.endswith("/"):
        # A folder may be called `songs.json`; it is one then.
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


# Settings of a source, and the types that they mean something to.
USED_BY: dict[str, tuple[SourceType, ...]] = {
    "extensions": ("folder", "webdataset"),
    "include": ("folder",),
    "exclude": ("folder",),
    "path_column": ("manifest",),
    "start_column": ("manifest",),
    "duration_column": ("manifest",),
    "key_column": ("manifest", "parquet"),
    "audio_column": ("parquet",),
}


def _refuse_unused(config: RunConfig, kind: SourceType) -> None:
    """A setting without effect is an error."""
    for name, kinds in USED_BY.items():
        default = type(config).model_fields[name].default
        if getattr(config, name) not in (default, "") and kind not in kinds:
            raise ConfigError(
                f"--{name.replace('_', '-')} has no effect on a source of type {kind}, only on "
                f"{' and '.join(kinds)}: remove it, or set --source-type."
            )


def source_settings(config: RunConfig) -> dict[str, Any]:
    """The settings that choose a source's items, where they are not the default, as JSON values."""
    values = config.model_dump(mode="json", include=set(SOURCE_SETTINGS))
    return {name: value for name, value in values.items() if value not in (None, [])}


def is_there(uri: str) -> bool:
    """Whether a source can still be reached; of a pattern, the folder before its wildcards, or else
    the first file of its braces: web servers may deny folders.
    """
    place = Place(uri)
    if place.kind() != "nothing":
        return True
    fixed = re.split(r"[*?\[{]", place.path, maxsplit=1)[0]
    if fixed == place.path:
        return False
    first = next(iter(braceexpand.braceexpand(place.path)))
    return bool(place.fs.exists(posixpath.dirname(fixed)) or place.fs.exists(first))
