"""The commands that copy and publish a store."""

from __future__ import annotations

from typing import Annotated

import typer

from latentmill.cli.entry import interrupts_raise
from latentmill.cli.log import Commands
from latentmill.cli.read import AsJson, Store, print_value

app = Commands()  # app.py adds its commands to the main app

Jobs = Annotated[
    int, typer.Option(min=1, max=64, help="Number of files that are copied at the same time.")
]


@app.command()
def sync(
    url: Store,
    dest: Annotated[
        str,
        typer.Argument(
            metavar="DEST", help="Folder or URL to write: new, or an earlier copy of this store."
        ),
    ],
    jobs: Jobs = 4,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print what would be copied, and write nothing.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Copy STORE to another folder or bucket, or update an earlier copy of it.

    Copies only what is missing, and checks each file. If it is interrupted, run it again to resume.
    """
    from latentmill.cli import show
    from latentmill.publishing.sync import sync as sync_store

    interrupts_raise()
    print_value(as_json, sync_store(url, dest, jobs=jobs, dry_run=dry_run), show.sync)
