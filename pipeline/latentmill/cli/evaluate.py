"""The command `evaluate`."""

from __future__ import annotations

from typing import Annotated

import typer

from latentmill.cli.entry import interrupts_raise
from latentmill.cli.log import Commands
from latentmill.cli.read import (
    AsJson,
    Device,
    ModelOption,
    Store,
    TrustModel,
    open_to_decode,
    print_value,
)
from latentmill.cli.report import RemoteSources
from latentmill.text.log import get_logger

_log = get_logger("cli")
app = Commands()  # app.py adds its command to the main app

Only = Annotated[
    list[str] | None,
    typer.Option(
        "--only",
        metavar="PART",
        help="Measure only this part: linearity, reconstruction, statistics or "
        "seams. Repeatable. \\[default: all]",
    ),
]
Items = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Number of items, spread evenly over the store. \\[default: 8; 32 for "
        "reconstruction, and for loudness in statistics]",
    ),
]
MaxSeconds = Annotated[
    float | None,
    typer.Option(
        min=0.1,
        help="Use at most this length of an item, in seconds; for seams, only items up to "
        "this length. \\[default: linearity one chunk, reconstruction 60, LUFS 300, seams 60 "
        "or five chunks]",
    ),
]
Gains = Annotated[
    list[float] | None,
    typer.Option(
        "--gain",
        metavar="FACTOR",
        help="Measure linearity for this gain, too, e.g. 0.1. Repeatable. \\[always measured: "
        "0.25, 0.5, 0.75, 1.1]",
    ),
]
Compat = Annotated[
    str | None,
    typer.Option(
        metavar="PROTOCOL",
        help="Measure linearity with the protocol of another package: linear-cae (only choice).",
    ),
]
Address = Annotated[
    str | None,
    typer.Option(
        help="Address of a Ray cluster that reads the shards for statistics. "
        "\\[default: RAY_ADDRESS, else this process]",
    ),
]


@app.command()
def evaluate(
    url: Store,
    only: Only = None,
    items: Items = None,
    max_seconds: MaxSeconds = None,
    gain: Gains = None,
    compat: Compat = None,
    address: Address = None,
    remote_sources: RemoteSources = False,
    device: Device = "auto",
    trust_model: TrustModel = False,
    model_option: ModelOption = None,
    as_json: AsJson = False,
) -> None:
    """Measure the quality of the latents of STORE on its own audio.

    linearity: how well latents scale, add and subtract.

    reconstruction: decoded records, compared with their source audio.

    statistics: channels, loudness, silence, duplicates, outliers; reads all latents.

    seams: the error of chunking, compared with encoding items in one piece.

    Writes evaluation/PART.json in the store, unless it is read-only.
    """
    from latentmill.cli import show_evaluation
    from latentmill.evaluation.evaluate import evaluate as evaluate_store

    store = open_to_decode(url, device, trust_model, model_option)
    interrupts_raise()
    result = evaluate_store(
        store,
        only=only,
        items=items,
        max_seconds=max_seconds,
        gains=gain or (),
        compat=compat,
        address=address,
        remote_sources=remote_sources,
    )
    print_value(as_json, result, show_evaluation.evaluation)
    if not store.sealed:
        _log.warning("not recorded: the store is not sealed yet; finish its run first")
