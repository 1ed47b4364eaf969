"""The commands that make stores from stores: select, split and merge."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from latentmill.cli.entry import interrupts_raise
from latentmill.cli.log import Commands
from latentmill.cli.read import AsJson, Store, print_value
from latentmill.errors import ConfigError

if TYPE_CHECKING:
    from latentmill.curation.selecting import Duplicates

app = Commands()  # app.py adds its commands to the main app

Dest = Annotated[str, typer.Argument(metavar="DEST", help="Folder or URL to write; new or empty.")]
Copy = Annotated[
    bool,
    typer.Option(
        "--copy",
        help="Write a store with copies of the latents instead of a view. The same command "
        "continues an interrupted copy.",
    ),
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace a view that is at DEST.")]


@app.command()
def select(
    url: Store,
    dest: Dest,
    where: Annotated[
        str | None,
        typer.Option(
            metavar="CONDITION",
            help="Keep records for which this holds, e.g. \"duration > 30 and genre == 'jazz'\".",
        ),
    ] = None,
    keys: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Keep the keys in this file, one per line."),
    ] = None,
    min_loudness: Annotated[
        float | None,
        typer.Option(metavar="DB", help="Leave out records with a lower RMS, in dBFS, e.g. -50."),
    ] = None,
    drop_duplicates: Annotated[
        str | None,
        typer.Option(
            metavar="KIND",
            help="Drop duplicates and keep the first record of each group. exact: equal files or "
            "latents. near: also almost equal latents; reads all latents. Silent records stay.",
        ),
    ] = None,
    drop_outliers: Annotated[
        bool,
        typer.Option(
            "--drop-outliers",
            help="Leave out records whose latents are unlike the others. Reads all latents. "
            "Silent records stay.",
        ),
    ] = False,
    sample: Annotated[
        float | None,
        typer.Option(
            metavar="SIZE",
            help="Keep this number of records at random, or this share of them, e.g. 0.1.",
        ),
    ] = None,
    stratify: Annotated[
        str | None,
        typer.Option(
            metavar="COLUMN",
            help="With --sample: take the same share of each value of this column.",
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the sample.")] = 0,
    copy: Copy = False,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Write a subset of STORE to DEST.

    DEST is a view by default: a small store that refers to the latents in STORE. You can open it,
    verify it and train on it like any store, as long as STORE exists. Records that are left out
    are counted by reason.
    """
    from latentmill.cli import show
    from latentmill.curation.select import select as select_records

    listed = None if keys is None else _lines(keys)
    kind: Duplicates | None = None
    if drop_duplicates is not None:
        if drop_duplicates not in ("exact", "near"):
            raise ConfigError(f"invalid --drop-duplicates {drop_duplicates!r}: use exact or near.")
        kind = "exact" if drop_duplicates == "exact" else "near"
    interrupts_raise()
    written = select_records(
        url,
        dest,
        where=where,
        keys=listed,
        min_loudness=min_loudness,
        drop_duplicates=kind,
        drop_outliers=drop_outliers,
        sample=sample,
        stratify=stratify,
        seed=seed,
        copy=copy,
        overwrite=overwrite,
    )
    print_value(as_json, written, show.curated)


@app.command()
def split(
    url: Store,
    dest: Annotated[
        str,
        typer.Argument(
            metavar="DEST", help="Folder or URL; each part becomes a view at DEST/NAME."
        ),
    ],
    into: Annotated[
        str,
        typer.Option(
            metavar="SHARES", help="Parts and their shares: train=0.9,valid=0.05,test=0.05."
        ),
    ],
    by: Annotated[
        str | None,
        typer.Option(
            metavar="COLUMN",
            help="Keep records with the same value of this column in one part. "
            "\\[default: the group, or else the key]",
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed; another one gives another split.")] = 0,
    duplicates_together: Annotated[
        bool,
        typer.Option(
            "--duplicates-together",
            help="Keep near duplicates in one part, too, except silent records. Reads all latents, "
            "and records the parts in DEST.",
        ),
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the views of an earlier split.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Divide STORE into parts, such as train, valid and test.

    The part of a record depends only on its group or key (or --by), the shares and the seed. So
    records that are added to STORE later never move others. With --duplicates-together, this holds
    only within the same DEST, which records the parts.
    """
    from latentmill.cli import show
    from latentmill.curation.split import split as split_store

    shares = _shares(into)
    interrupts_raise()
    sides = split_store(
        url,
        dest,
        shares,
        by=by,
        seed=seed,
        duplicates_together=duplicates_together,
        overwrite=overwrite,
    )
    print_value(as_json, sides, show.split)


@app.command()
def merge(
    paths: Annotated[
        list[str],
        typer.Argument(
            metavar="STORE... DEST", help="Stores to read, and the folder or URL to write."
        ),
    ],
    prefix: Annotated[
        bool,
        typer.Option(
            "--prefix",
            help="Prefix each key and group with the folder name of its store, e.g. latents/KEY.",
        ),
    ] = False,
    copy: Copy = False,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Combine several stores that were encoded with the same settings.

    The result refers to their latents; --copy copies them.
    """
    from latentmill.cli import show
    from latentmill.curation.merge import merge as merge_stores

    if len(paths) < 2:
        raise ConfigError(
            "merge needs at least one store and the output: latentmill merge A B DEST."
        )
    interrupts_raise()
    *stores, dest = paths
    written = merge_stores(stores, dest, prefix=prefix, copy=copy, overwrite=overwrite)
    print_value(as_json, written, show.curated)


def _lines(file: Path) -> list[str]:
    try:
        text = file.read_bytes().decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise ConfigError(f"Cannot read {file}: {why}.") from error
    # A key can contain what other functions take for the end of a line, such as U+2028.
    lines = (line.removesuffix("\r") for line in text.split("\n"))
    return [line for line in lines if line.strip()]


def _shares(text: str) -> dict[str, float]:
    shares: dict[str, float] = {}
    for part in text.split(","):
        name, _, share = part.strip().partition("=")
        try:
            if name in shares:
                raise ValueError
            shares[name] = float(share)
        except ValueError:
            raise ConfigError(
                f"invalid --into {text!r}: write it like train=0.9,valid=0.05,test=0.05."
            ) from None
    return shares
