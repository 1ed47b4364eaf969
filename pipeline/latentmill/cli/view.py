"""The command that serves a page over a store."""

from __future__ import annotations

from typing import Annotated

import typer

from latentmill.cli.entry import interrupts_raise, interrupts_stop
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

app = Commands()  # app.py adds its command to the main app


@app.command()
def view(
    url: Store,
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="Port on 127.0.0.1; 0 for any free one.")
    ] = 0,
    browser: Annotated[
        bool,
        typer.Option("--browser/--no-browser", help="Open the page in a browser, if there is one."),
    ] = True,
    remote_sources: RemoteSources = False,
    device: Device = "auto",
    trust_model: TrustModel = False,
    model_option: ModelOption = None,
    as_json: AsJson = False,
) -> None:
    """Open STORE in a browser: search, view and play records, and mix them in latent space.

    A server on this computer serves the page. It writes nothing, and only this computer can reach
    it. The address contains a secret token. Press Ctrl-C to stop the server.
    """
    from latentmill.view.serve import check_installed, has_display, serve

    check_installed()
    interrupts_raise()  # temporary files are removed
    store = open_to_decode(url, device, trust_model, model_option)

    def ready(address: str) -> None:
        interrupts_stop()
        print_value(
            as_json,
            {"store": store.url, "records": len(store), "url": address},
            lambda value: (
                f"{value['store']} is shown at\n  {value['url']}\nCtrl-C stops the server."
            ),
        )

    opened = {
        "device": device if device != "auto" else None,
        "trust_model": trust_model,
        "model_options": dict(store.model_options),
    }
    serve(
        store,
        port=port,
        options="".join(f", {name}={value!r}" for name, value in opened.items() if value),
        remote_sources=remote_sources,
        browser=browser and has_display(),
        ready=ready,
    )
