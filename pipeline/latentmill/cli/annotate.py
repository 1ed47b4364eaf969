"""The command that adds metadata to a store."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from latentmill.cli.entry import interrupts_raise
from latentmill.cli.log import Commands
from latentmill.cli.read import AsJson, print_value
from latentmill.errors import ConfigError
from latentmill.text.printing import counted

if TYPE_CHECKING:
    from latentmill.curation.annotate import AnnotateSummary

app = Commands()  # app.py adds its command to the main app


@app.command()
def annotate(
    url: Annotated[str, typer.Argument(metavar="STORE", help="Store to change: a folder or URL.")],
    file: Annotated[
        str | None,
        typer.Option(
            "--from",
            metavar="FILE",
            help="CSV, TSV, JSONL or Parquet file with a column of keys and columns of metadata.",
        ),
    ] = None,
    key_column: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Column of keys. \\[default: key or id]"),
    ] = None,
    remove: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="Remove the annotated values of this name, before --from adds values. Repeatable.",
        ),
    ] = None,
    revert: Annotated[
        bool, typer.Option("--revert", help="Undo the last change, or go to the version of --to.")
    ] = False,
    to: Annotated[
        int | None,
        typer.Option(
            min=0, metavar="N", help="With --revert: version to return to; 0 for no annotations."
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Add metadata from a file to the records of STORE, without encoding again.

    Annotated values replace stored ones of the same name; empty cells change nothing. Each change
    is a new version, and no version is deleted.
    """
    from latentmill.curation.annotate import annotate as annotate_store
    from latentmill.curation.annotate import revert_annotations

    if revert and (file or remove or key_column):
        raise ConfigError(
            "--revert cannot be combined with --from, --remove or --key-column: run two commands."
        )
    if to is not None and not revert:
        raise ConfigError("--to has no effect without --revert: add --revert, or leave it out.")
    if not revert and not file and not remove:
        raise ConfigError("annotate needs --from FILE, --remove NAME or --revert.")
    if key_column and not file:
        raise ConfigError("--key-column has no effect without --from: leave it out.")
    interrupts_raise()
    if revert:
        summary = revert_annotations(url, to)
    else:
        summary = annotate_store(url, file, key_column=key_column, remove=remove or ())
    print_value(as_json, summary, _text)


def _text(value: AnnotateSummary) -> str:
    names = ", ".join(value.names) or "none"
    has = f"version {value.version} of the annotations"
    unchanged = "" if value.changed else " (nothing changed)"
    lines = [f"{value.store}: {has}{unchanged}, {counted(value.records, 'record')}; names: {names}"]
    if value.unknown:
        keys = ", ".join(value.unknown_keys[:3])
        more = ", ..." if value.unknown > 3 else ""
        lines.append(
            f"  keys that the store does not have: {value.unknown} of "
            f"{value.matched + value.unknown} ({keys}{more})"
        )
    if value.ignored:
        lines.append(f"  ignored (names of stored fields): {', '.join(value.ignored)}")
    return "\n".join(lines)
