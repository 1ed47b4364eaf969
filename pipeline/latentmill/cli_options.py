"""Options that `encode` and `plan` share: which items of a source are taken."""

from __future__ import annotations

from typing import Annotated

import typer

Panel = "Source"
Filter = "Filters"

SourceType = Annotated[
    str | None,
    typer.Option(
        help="folder, manifest, webdataset or parquet (default: by name).", rich_help_panel=Panel
    ),
]
Include = Annotated[
    list[str] | None,
    typer.Option(help="Glob over a folder's paths, such as '*/vocals.*'.", rich_help_panel=Panel),
]
Exclude = Annotated[
    list[str] | None, typer.Option(help="The same for what to leave.", rich_help_panel=Panel)
]
Extensions = Annotated[
    list[str] | None, typer.Option(help="File name extension of audio.", rich_help_panel=Panel)
]
PathColumn = Annotated[
    str | None, typer.Option(help="A manifest's column of paths.", rich_help_panel=Panel)
]
StartColumn = Annotated[
    str | None, typer.Option(help="Its column of starts, in seconds.", rich_help_panel=Panel)
]
DurationColumn = Annotated[
    str | None, typer.Option(help="Its column of durations.", rich_help_panel=Panel)
]
KeyColumn = Annotated[
    str | None, typer.Option(help="A table's column of unique names.", rich_help_panel=Panel)
]
AudioColumn = Annotated[
    str | None, typer.Option(help="A Parquet file's column of audio.", rich_help_panel=Panel)
]
GroupBy = Annotated[
    str | None,
    typer.Option(
        help="What belongs together: a regular expression over keys with (?P<group>...) and "
        "(?P<role>...), or metadata:FIELD,FIELD.",
        rich_help_panel=Panel,
    ),
]
MinSeconds = Annotated[
    float | None, typer.Option(help="Skip shorter items.", rich_help_panel=Filter)
]
MaxSeconds = Annotated[
    float | None, typer.Option(help="Skip longer items.", rich_help_panel=Filter)
]
MinRms = Annotated[
    float | None, typer.Option(help="Skip softer items, dBFS.", rich_help_panel=Filter)
]
MinSampleRate = Annotated[
    int | None, typer.Option(help="Skip lower sample rates.", rich_help_panel=Filter)
]
MaxSampleRate = Annotated[
    int | None, typer.Option(help="Skip higher sample rates.", rich_help_panel=Filter)
]
MinChannels = Annotated[
    int | None, typer.Option(help="Skip fewer channels.", rich_help_panel=Filter)
]
MaxChannels = Annotated[
    int | None, typer.Option(help="Skip more channels.", rich_help_panel=Filter)
]
Where = Annotated[
    str | None,
    typer.Option(
        help="Skip items whose metadata differ: \"genre == 'rock' and bpm > 100\".",
        rich_help_panel=Filter,
    ),
]
