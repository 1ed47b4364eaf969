"""The settings of a source, and the properties that every setting declares."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field
from pydantic.fields import FieldInfo

from latentmill.audio.formats import AUDIO_EXTENSIONS
from latentmill.sources.base import SourceType

Effect = Literal["latents", "model", "items", "run"]


@dataclass(frozen=True)
class Setting:
    """Properties of a setting besides its name, type, default, bounds and help text.

    Attributes:
        group: Heading of its option in `encode --help`; empty: the general options.
        effect: What it changes. `latents`: it is part of the fingerprint, under its name. `model`:
            its resolved value (the model's identity, the chunks, the precision) is part of the
            fingerprint. `items`: which items are planned; it is stored in the plan. `run`: only how
            fast, where or into which files the run writes.
        sources: Types of source that it applies to; empty: all. It is an error for other types.
    """

    group: str = ""
    effect: Effect = "run"
    sources: tuple[SourceType, ...] = ()

    @staticmethod
    def of(field: FieldInfo) -> Setting:
        """The properties that a field is annotated with."""
        return next(one for one in field.metadata if isinstance(one, Setting))


def option(name: str) -> str:
    """How a user types a setting: `--chunk-seconds`, or `SOURCE` and `STORE` for arguments."""
    special = {
        "source": "SOURCE",
        "out": "STORE",
        "model_options": "--model-option",
        "with_fields": "--with",
    }
    return special.get(name) or "--" + name.replace("_", "-")


def choices(literal: Any) -> str:
    """The values of a Literal for a help text: `parquet or webdataset`."""
    *first, last = get_args(literal)
    return f"{', '.join(first)} or {last}"


def _source(*types: SourceType) -> Setting:
    return Setting("Source", "items", types)


class SourceSettings(BaseModel):
    """The location of the audio, and which files or rows become items."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    source: Annotated[str, Setting()] = Field(
        description="Folder, manifest, WebDataset tars or Parquet files: a path or URL."
    )
    source_type: Annotated[SourceType | None, _source()] = Field(
        None,
        description=f"Type of SOURCE: {choices(SourceType)}. [default: by its name]",
    )
    include: Annotated[tuple[str, ...], _source("folder")] = Field(
        (), description="Folders only: glob of paths to include, e.g. '*/vocals.*'. Repeatable."
    )
    exclude: Annotated[tuple[str, ...], _source("folder")] = Field(
        (), description="Folders only: glob of paths to skip, e.g. '*/drafts/*'. Repeatable."
    )
    extensions: Annotated[tuple[str, ...], _source("folder", "webdataset")] = Field(
        AUDIO_EXTENSIONS,
        description="Extension of files to include, e.g. .wav. Repeatable. "
        "[default: all that can be loaded]",
    )
    path_column: Annotated[str | None, _source("manifest")] = Field(
        None,
        description="Manifest column of paths or URLs. [default: a column with a usual "
        "name, such as path]",
    )
    start_column: Annotated[str | None, _source("manifest")] = Field(
        None,
        description="Manifest column of segment starts, in seconds. [default: a column with a "
        "usual name, such as start]",
    )
    duration_column: Annotated[str | None, _source("manifest")] = Field(
        None,
        description="Manifest column of segment durations, in seconds. [default: a column with a "
        "usual name, such as duration]",
    )
    key_column: Annotated[str | None, _source("manifest", "parquet")] = Field(
        None, description="Manifest or Parquet column of unique item keys."
    )
    audio_column: Annotated[str | None, _source("parquet")] = Field(
        None, description="Parquet column that holds the audio."
    )
    group_by: Annotated[str | None, _source()] = Field(
        None,
        description="Put items that belong together, such as stems, in one group: a regular "
        "expression over keys with (?P<group>...) and (?P<role>...), or metadata:FIELD,FIELD.",
    )
