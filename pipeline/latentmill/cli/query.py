"""The commands that search the records of a store: by SQL, and by their latents."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from latentmill.cli.entry import interrupts_raise
from latentmill.cli.log import Commands
from latentmill.cli.read import AsJson, Device, Overwrite, Store, TrustModel, print_value
from latentmill.errors import ConfigError
from latentmill.text.printing import counted, number_text, printable

if TYPE_CHECKING:
    from latentmill.curation.query import Rows

app = Commands()  # app.py adds its command to the main app

PRINTED = 50
WIDEST = 60  # characters of a cell


@app.command()
def query(
    url: Store,
    sql: Annotated[
        str,
        typer.Argument(
            metavar="SQL",
            help="A SELECT statement over the table records, e.g. 'SELECT key, duration FROM "
            "records WHERE metadata_bpm > 120'.",
        ),
    ],
    file: Annotated[
        Path | None,
        typer.Option("-o", "--output", help="Write the result to this .csv or .parquet file."),
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(min=1, help="Number of rows to print. \\[default: 50; all rows with --json]"),
    ] = None,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Run SQL over the metadata of STORE, one row per record (needs DuckDB: extra `query`).

    `DESCRIBE records` lists the columns. A query cannot change the store or read other files.
    """
    from latentmill.curation.query import first_rows, write_query
    from latentmill.store.store import open_store

    if limit is not None and file is not None:
        raise ConfigError("--limit has no effect with -o: add LIMIT to the query.")
    store = open_store(url)
    interrupts_raise()
    if file is not None:
        rows = write_query(store, sql, file, overwrite=overwrite)
        print_value(
            as_json,
            {"file": str(file), "rows": rows},
            lambda value: f"{value['file']}: {counted(value['rows'], 'row')}",
        )
        return
    most = limit if as_json or limit else PRINTED
    print_value(as_json, first_rows(store, sql, most), _text)


@app.command()
def neighbours(
    url: Store,
    item: Annotated[
        str,
        typer.Argument(metavar="KEY|AUDIOFILE", help="Key of a record, or path of an audio file."),
    ],
    count: Annotated[int, typer.Option(min=1, help="Number of neighbours.")] = 10,
    field: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Compare the vectors of this field. Needs a KEY."),
    ] = None,
    device: Device = "auto",
    trust_model: TrustModel = False,
    as_json: AsJson = False,
) -> None:
    """List the records of STORE whose latents are most similar to a record or an audio file.

    Run `latentmill evaluate STORE --only statistics` first, unless you use --field. An audio file
    is encoded with the model of STORE.
    """
    from latentmill.curation.neighbours import neighbours as nearest
    from latentmill.store.store import open_store

    store = open_store(url, device=device, trust_model=trust_model)
    interrupts_raise()
    print_value(
        as_json,
        nearest(store, item, count, field=field),
        lambda found: "\n".join(
            f"{one.similarity:8.4f} {one.duration:9.2f} s  {one.key}" for one in found
        ),
    )


def _text(value: Rows) -> str:
    """A table with a line for each row."""
    cells = [tuple(map(_cell, value.columns)), *(tuple(map(_cell, row)) for row in value.rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    numeric = [
        all(isinstance(row[at], int | float | None) for row in value.rows)
        for at in range(len(value.columns))
    ]
    lines = [
        "  ".join(
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(row, widths, numeric, strict=True)
        ).rstrip()
        for row in cells
    ]
    lines.insert(1, "  ".join("-" * width for width in widths))
    if value.total > len(value.rows):
        lines.append(
            f"... {len(value.rows)} of {value.total} rows; -o FILE writes all, --limit N prints N"
        )
    else:
        lines.append(f"({counted(value.total, 'row')})")
    return "\n".join(lines)


def _cell(value: Any) -> str:
    if isinstance(value, float):
        text = number_text(value, 6)
    elif value is None:
        text = ""
    else:
        text = printable(str(value))
    return text if len(text) <= WIDEST else f"{text[: WIDEST - 1]}\u2026"
