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


DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Print what would be copied, and write nothing.")
]
Hub = Annotated[
    str,
    typer.Argument(
        metavar="REPO", help="Dataset on the Hugging Face hub: hf://datasets/USER/NAME."
    ),
]

CopyDest = Annotated[
    str,
    typer.Argument(
        metavar="DEST", help="Folder or URL to write: new, or an earlier copy of this store."
    ),
]


@app.command()
def sync(
    url: Store,
    dest: CopyDest,
    jobs: Jobs = 4,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Copy STORE to another folder or bucket, or update an earlier copy of it.

    Copies only what is missing, and checks each file. If it is interrupted, run it again to resume.
    """
    from latentmill.cli import show
    from latentmill.publishing.sync import sync as sync_store

    interrupts_raise()
    print_value(as_json, sync_store(url, dest, jobs=jobs, dry_run=dry_run), show.sync)


@app.command()
def push(
    url: Store,
    repo: Hub,
    public: Annotated[
        bool,
        typer.Option("--public", help="Let everyone read the repository. \\[default: private]"),
    ] = False,
    revision: Annotated[
        str | None,
        typer.Option(help="Branch to write; created if it does not exist. \\[default: main]"),
    ] = None,
    message: Annotated[str | None, typer.Option(help="Message of the commits.")] = None,
    license_: Annotated[
        str | None,
        typer.Option("--license", help="License for the dataset card, e.g. cc-by-4.0."),
    ] = None,
    jobs: Jobs = 4,
    as_json: AsJson = False,
) -> None:
    """Publish STORE as a dataset on the Hugging Face hub, or update it there.

    Uploads only what is missing. If it is interrupted, run it again to resume. A view is published
    as a store with its own latents. Log in with `hf auth login`, or set HF_TOKEN.
    """
    from latentmill.cli import show
    from latentmill.publishing.hub import push as push_store

    interrupts_raise()
    result = push_store(
        url,
        repo,
        public=public,
        revision=revision,
        message=message,
        license=license_,
        jobs=jobs,
    )
    print_value(as_json, result, show.push)


@app.command()
def pull(
    repo: Hub,
    dest: CopyDest,
    jobs: Jobs = 4,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Copy a store from the Hugging Face hub, or update a copy of it.

    For a branch, tag or commit, use hf://datasets/USER/NAME@REVISION.
    """
    from latentmill.cli import show
    from latentmill.publishing.hub import pull as pull_store

    interrupts_raise()
    print_value(as_json, pull_store(repo, dest, jobs=jobs, dry_run=dry_run), show.sync)
