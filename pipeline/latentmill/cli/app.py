"""The commands that write or inspect a store.

Commands import slow modules themselves, so that `--help` and `status` start quickly.
"""

from __future__ import annotations

import contextlib
import inspect
import sys
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from latentmill import __version__
from latentmill.cli import annotate as cli_annotate
from latentmill.cli import curate as cli_curate
from latentmill.cli import decode as cli_decode
from latentmill.cli import evaluate as cli_evaluate
from latentmill.cli import probe as cli_probe
from latentmill.cli import publish as cli_publish
from latentmill.cli import query as cli_query
from latentmill.cli import read as cli_read
from latentmill.cli import report as cli_report
from latentmill.cli import view as cli_view
from latentmill.cli.entry import interrupts_raise, main
from latentmill.cli.log import Command, Commands, Quiet, Verbose, set_format
from latentmill.cli.read import AsJson, Device, Store, TrustModel, print_value
from latentmill.errors import IncompleteStoreWarning, StoreError, VerifyError
from latentmill.text.printing import counted, printable_lines

if TYPE_CHECKING:
    from latentmill.config import RunConfig

app = Commands(
    help="Encode audio corpora into datasets of latents, and decode latents to audio.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(cli_decode.app)
app.add_typer(cli_read.app)
app.add_typer(cli_evaluate.app)
app.add_typer(cli_publish.app)
app.add_typer(cli_curate.app)
app.add_typer(cli_report.app)
app.add_typer(cli_view.app)
app.add_typer(cli_annotate.app)
app.add_typer(cli_query.app)

FieldName = Annotated[
    str, typer.Option(metavar="NAME", help="Name of the field: letters, digits, - and _.")
]
PerWindow = Annotated[
    bool,
    typer.Option(
        "--per-window", help="Store a vector for each window of an item instead of their mean."
    ),
]
FromSource = Annotated[
    str,
    typer.Option(
        "--from",
        metavar="SOURCE",
        help="Input of the model: audio, metadata:NAME (a text) or latents. Or values to import: a "
        ".parquet or .jsonl file with a column of keys, or a folder of .npy files.",
    ),
]
StoreArgument = Annotated[
    str, typer.Argument(metavar="STORE", help="Store to add to: a folder or URL.")
]
Function = Callable[..., Any]
ModelName = Annotated[
    str | None,
    typer.Argument(
        metavar="MODEL", help="Model to show, e.g. lin-cae. \\[default: list all models]"
    ),
]
Calibrate = Annotated[
    bool,
    typer.Option(
        "--calibrate/--no-calibrate",
        help="Estimate the time: load the model and encode a few chunks of noise.",
    ),
]


def _command(options: str, **own: tuple[Any, Any]) -> Callable[[Function], Function]:
    """Register a command whose options are made when they are needed.

    They are generated from the settings, and importing those takes longer than `status` should.

    Args:
        options: The function of cli/options.py that returns their annotations.
        own: More options, each an annotation and a default.
    """

    def decorate(function: Function) -> Function:
        class Lazy(Command):
            _made = False

            def get_params(self, ctx: Any) -> Any:
                if not self._made:
                    from latentmill.cli import options as made_options

                    shared = getattr(made_options, options)()
                    kinds = {name: (kind, None) for name, kind in shared.items()} | own
                    maker = typer.Typer(add_completion=False)
                    maker.command()(made_options.with_options(function, kinds))
                    built = typer.main.get_command(maker)
                    self.params, self.callback, self._made = built.params, built.callback, True
                return super().get_params(ctx)

        def placeholder() -> None: ...

        name = function.__name__
        app.command(name, help=inspect.getdoc(function), cls=Lazy)(placeholder)
        return function

    return decorate


@_command("encode_options", trust_model=(TrustModel, False), as_json=(AsJson, False))
def encode(**options: Any) -> int:
    """Encode SOURCE into STORE. If it is interrupted, run the same command again to resume."""
    from latentmill.cli import show
    from latentmill.engine.progress import for_stream
    from latentmill.run.run import run

    settings = _settings(options)
    set_format(settings.log_format)
    interrupts_raise()
    with contextlib.redirect_stdout(sys.stderr):  # Ray may print to stdout
        summary = run(settings, for_stream(settings.log_format))
    print_value(options["as_json"], summary, show.summary)
    return summary.exit_code


@_command(
    "encode_options",
    calibrate=(Calibrate, True),
    trust_model=(TrustModel, False),
    as_json=(AsJson, False),
)
def plan(**options: Any) -> None:
    """Plan a run without encoding: list the items, estimate hours, size and time.

    `encode` with the same options continues from this plan.
    """
    from latentmill.cli import show
    from latentmill.engine.progress import for_stream
    from latentmill.run.forecast import forecast

    calibrated = options.pop("calibrate")
    settings = _settings(options)
    set_format(settings.log_format)
    interrupts_raise()
    with contextlib.redirect_stdout(sys.stderr):
        value = forecast(settings, for_stream(settings.log_format), calibrated=calibrated)
    print_value(options["as_json"], value, show.forecast)


@_command(
    "add_options",
    store=(StoreArgument, ...),
    field=(FieldName, ...),
    from_=(FromSource, "audio"),
    per_window=(PerWindow, False),
    as_json=(AsJson, False),
)
def add(**options: Any) -> int:
    """Add a field to STORE: the values of another model for the same items, in STORE/fields/NAME.

    The model takes the audio of the items, or with --from a text of their metadata or their
    latents.

    The store itself does not change. Run the same command again to resume, or to bring the field up
    to date after the store was extended or items were encoded again.
    """
    from latentmill.cli import show
    from latentmill.engine.progress import for_stream
    from latentmill.run.add import run_add

    store, name, as_json = options.pop("store"), options.pop("field"), options.pop("as_json")
    per_window, source = options.pop("per_window"), options.pop("from_")
    model_options = _options(options.pop("model_option"), options.pop("revision"))
    as_lines = options["log_format"] == "json"
    set_format("json" if as_lines else "text")
    interrupts_raise()
    with contextlib.redirect_stdout(sys.stderr):
        given = {**options, "model_options": model_options}
        progress = for_stream("json" if as_lines else "text")
        summary = run_add(store, name, given, progress, source=source, per_window=per_window)
    print_value(as_json, summary, show.summary)
    return summary.exit_code


@app.command()
def drop(
    store: Annotated[
        str, typer.Argument(metavar="STORE", help="Store to remove from: a folder or URL.")
    ],
    field: FieldName,
    as_json: AsJson = False,
) -> None:
    """Remove a field of STORE. The store itself and its other fields do not change."""
    from latentmill.cli import show
    from latentmill.run.drop import drop as drop_field

    interrupts_raise()
    print_value(as_json, drop_field(store, field=field), show.dropped)


@app.command()
def status(store: Store, as_json: AsJson = False) -> None:
    """Show how much of STORE is encoded, which items failed, and the current run."""
    from latentmill.cli import show_status
    from latentmill.store.store import open_store

    try:
        opened = open_store(store)
    except StoreError as error:
        raise show_status.planning_error(store) or error from None
    print_value(as_json, show_status.StoreStatus.of(opened), show_status.status)


@app.command()
def info(store: Store, as_json: AsJson = False) -> None:
    """Show the model, format, rates, hours and latent statistics of STORE."""
    from latentmill.cli import show
    from latentmill.store.store import open_store

    opened = open_store(store)
    names = opened.fields
    print_value(as_json, opened.measured_info, lambda value: show.info(value, names))


@app.command()
def verify(
    store: Store,
    decode: Annotated[
        int,
        typer.Option(
            min=0, help="Number of records to decode and compare with their source audio."
        ),
    ] = 0,
    remote_sources: cli_report.RemoteSources = False,
    device: Device = "auto",
    trust_model: TrustModel = False,
    as_json: AsJson = False,
) -> None:
    """Check hashes, counts and values of STORE. The exit code is 8 if it finds a fault."""
    from latentmill.cli import show
    from latentmill.fields.verify import field_faults, verify_fields
    from latentmill.store.store import open_store
    from latentmill.store.verify import verify as verify_store

    interrupts_raise()
    opened = open_store(store, device=device, trust_model=trust_model)
    report = verify_store(opened, decode=decode, remote_sources=remote_sources)
    if opened.bases is None:
        report.fields = verify_fields(opened.storage)
        report.faults += field_faults(report.fields)
    print_value(as_json, report, show.verification)
    if report.faults:
        raise VerifyError(
            f"found {counted(len(report.faults), 'fault')} in {store}; first: {report.faults[0]}."
        )


@_command("model_options", name=(ModelName, None), as_json=(AsJson, False))
def models(
    name: str | None,
    model_option: list[str] | None,
    revision: str | None,
    channels: str | None,
    as_json: bool,
) -> None:
    """List available models, or show details of one (requires its weights)."""
    from latentmill.cli import show
    from latentmill.models import registry

    if name is None:
        print_value(as_json, registry.available(), show.models)
    elif registry.embeds_only(name):
        handle = registry.resolve_embedder(name, _options(model_option, revision))
        print_value(as_json, handle.spec, show.model)
    else:
        from latentmill.models.families.audio_encoder import can_decode  # imports torch

        model = registry.resolve(name, _options(model_option, revision), channels)
        print_value(as_json, model.spec, partial(show.model, decodes=can_decode(model)))


@_command(
    "model_options",
    name=(cli_probe.Model, inspect.Parameter.empty),
    audio=(cli_probe.Audio, None),
    device=(Device, "auto"),
    as_json=(AsJson, False),
)
def probe(
    name: str,
    model_option: list[str] | None,
    revision: str | None,
    channels: str | None,
    audio: str | None,
    device: str,
    as_json: bool,
) -> None:
    """Test whether MODEL behaves as it declares: lengths, context, batches, noise, decoding.

    It prints the claimed and the measured value of each check, what to correct for each check that
    fails, and a spec with the measured values to paste. The exit code is 8 if a check fails.
    """
    from latentmill.evaluation.probe import probe as probe_model

    interrupts_raise()
    options = _options(model_option, revision)
    result = probe_model(name, audio=audio, device=device, model_options=options, channels=channels)
    print_value(as_json, result, cli_probe.shown)
    if result.failed:
        raise VerifyError(
            f"{name} fails {counted(len(result.failed), 'check')}; first: {result.failed[0]}"
        )


@app.command()
def demo(
    source: Annotated[
        str | None,
        typer.Argument(
            metavar="SOURCE",
            help="Folder with your own audio. \\[default: a small synthetic corpus]",
        ),
    ] = None,
    folder: Annotated[
        Path, typer.Option("-o", "--output", help="Folder for the corpus, the store and mix.wav.")
    ] = Path("demo"),
) -> None:
    """Encode a small corpus (or your own audio), mix latents of it, and decode the mix."""
    from latentmill.cli.demo import run_demo

    interrupts_raise()
    run_demo(folder, source, lambda text: typer.echo(printable_lines(text)))


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


@app.callback(no_args_is_help=True)
def _options_of_all(
    _version: Annotated[
        bool,
        typer.Option(
            "--version", help="Print the version and exit.", is_eager=True, callback=_print_version
        ),
    ] = False,
    _verbose: Verbose = False,
    _quiet: Quiet = False,
) -> None:
    # `status` and `info` report an incomplete store themselves.
    warnings.simplefilter("ignore", IncompleteStoreWarning)


@app.command()
def version() -> None:
    """Print the version."""
    typer.echo(__version__)


def _settings(options: Mapping[str, Any]) -> RunConfig:
    """The validated settings of `encode` or `plan`."""
    from latentmill.config import load_config

    model_options = _options(options["model_option"], options["revision"])
    with_fields = cli_read.parsed_fields(options["with_"])
    given = {**options, "model_options": model_options, "with_fields": with_fields}
    for name in ("config", "model_option", "revision", "with_", "trust_model", "as_json"):
        del given[name]
    return load_config(options["config"], given, trust_model=options["trust_model"])


def _options(pairs: list[str] | None, revision: str | None) -> dict[str, Any] | None:
    """The options of a model; None if there are none."""
    given = {} if revision is None else {"revision": revision}
    return given | cli_read.parsed_options(pairs) or None


if __name__ == "__main__":
    main()
