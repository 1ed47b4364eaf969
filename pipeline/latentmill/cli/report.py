"""The command `report`."""

from __future__ import annotations

from typing import Annotated

import typer

from latentmill.cli.entry import interrupts_raise
from latentmill.cli.log import Commands
from latentmill.cli.read import (
    AsJson,
    Device,
    ModelOption,
    Overwrite,
    Store,
    TrustModel,
    open_to_decode,
    print_value,
)
from latentmill.reporting.settings import DEFAULT_NAME, ITEMS

RemoteSources = Annotated[
    bool,
    typer.Option(
        "--remote-sources",
        help="Also read source audio from other addresses than this machine and the bucket or "
        "server of STORE. Use it only for stores that you trust.",
    ),
]

app = Commands()  # app.py adds its command to the main app


@app.command()
def report(
    url: Store,
    output: Annotated[
        str,
        typer.Option("-o", "--output", help="File or URL to write, e.g. s3://bucket/report.html."),
    ] = DEFAULT_NAME,
    items: Annotated[
        int, typer.Option(min=0, help="Number of records with pictures and players.")
    ] = ITEMS,
    remote_sources: RemoteSources = False,
    overwrite: Overwrite = False,
    device: Device = "auto",
    trust_model: TrustModel = False,
    model_option: ModelOption = None,
    as_json: AsJson = False,
) -> None:
    """Write a page about STORE with pictures and players, which opens in any browser.

    It shows the contents, failures, speed, results of `evaluate`, a map, and excerpts of records.
    """
    from latentmill.cli import show
    from latentmill.reporting.report import report as report_store

    store = open_to_decode(url, device, trust_model, model_option)
    interrupts_raise()
    written = report_store(
        store, output, items=items, overwrite=overwrite, remote_sources=remote_sources
    )
    print_value(as_json, written, show.report)
