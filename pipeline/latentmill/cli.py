"""The command line, thin: each command is a call of the library and a few lines of print."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from latentmill import cli_options as opt
from latentmill import cli_read, show
from latentmill.cli_read import AsJson, Device, Store, TrustModel, print_value
from latentmill.config import RunConfig, load_config
from latentmill.errors import (
    INTERRUPTED_EXIT_CODE,
    ConfigError,
    HeadGoneError,
    IncompleteStoreWarning,
    LatentmillError,
    VerifyError,
)
from latentmill.forecast import forecast
from latentmill.models import registry
from latentmill.printing import printable, printable_lines
from latentmill.run import run
from latentmill.store.store import open_store
from latentmill.store.verify import verify as verify_store
from latentmill.version import __version__

app = typer.Typer(
    help="Audio corpora to latent datasets, and back.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(cli_read.app)

Calibrate = Annotated[
    bool,
    typer.Option("--calibrate/--no-calibrate", help="Encode a few chunks to estimate the time."),
]


def main() -> NoReturn:
    """Run the command line; errors of ours become one sentence and their exit code."""
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        code = app(standalone_mode=False)
        if code == INTERRUPTED_EXIT_CODE:  # as typer passes on a KeyboardInterrupt
            raise KeyboardInterrupt
    except LatentmillError as error:
        print(f"latentmill: {printable(str(error))}", file=sys.stderr, flush=True)  # noqa: T201
        if isinstance(error, HeadGoneError):  # Ray would wait for it, and end the process with 1
            os._exit(error.exit_code)
        sys.exit(error.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        print("latentmill: interrupted; the same command resumes", file=sys.stderr)  # noqa: T201
        sys.exit(INTERRUPTED_EXIT_CODE)
    except Exception as error:
        if hasattr(error, "format_message") and hasattr(error, "exit_code"):  # wrong usage
            if message := error.format_message():
                print(f"latentmill: {printable_lines(message)}", file=sys.stderr)  # noqa: T201
            sys.exit(error.exit_code)
        raise
    sys.exit(code if isinstance(code, int) else 0)


def _interrupt(signum: int, frame: object) -> NoReturn:
    raise KeyboardInterrupt


@app.command()
@opt.takes(opt.ENCODE, trust_model=(TrustModel, False), as_json=(AsJson, False))
def encode(**options: Any) -> int:
    """Encode SOURCE into STORE. Run the same command again to resume."""
    settings = _settings(options)
    with contextlib.redirect_stdout(sys.stderr):  # where Ray may complain of a lost worker
        summary = run(settings, show.progress(settings.log_format))
    print_value(options["as_json"], summary, show.summary)
    return summary.exit_code


@app.command()
@opt.takes(
    opt.ENCODE,
    calibrate=(Calibrate, True),
    trust_model=(TrustModel, False),
    as_json=(AsJson, False),
)
def plan(**options: Any) -> None:
    """Freeze the plan that `encode` with the same settings resumes, and say what it comes to."""
    calibrated = options.pop("calibrate")
    settings = _settings(options)
    with contextlib.redirect_stdout(sys.stderr):
        value = forecast(settings, show.progress(settings.log_format), calibrated=calibrated)
    print_value(options["as_json"], value, show.forecast)


@app.command()
def status(store: Store, as_json: AsJson = False) -> None:
    """Say how far a store is: units, items, failures. Needs no Ray."""
    print_value(as_json, show.StoreStatus.of(open_store(store)), show.status)


@app.command()
def info(store: Store, as_json: AsJson = False) -> None:
    """Say what a store is: model, format, rates, hours, statistics."""
    print_value(as_json, open_store(store).measured_info, show.info)


@app.command()
def verify(
    store: Store,
    decode: Annotated[int, typer.Option(min=0, help="Decode N records back to audio.")] = 0,
    device: Device = "auto",
    trust_model: TrustModel = False,
    as_json: AsJson = False,
) -> None:
    """Check hashes, counts, numbers; exit code 8 if the store is not whole."""
    report = verify_store(open_store(store, device=device, trust_model=trust_model), decode=decode)
    print_value(as_json, report, show.verification)
    if report.faults:
        raise VerifyError(f"{len(report.faults)} faults in {store}, the first: {report.faults[0]}.")


@app.command()
def models(
    name: Annotated[
        str | None, typer.Argument(help="One model: its lengths and stitching.")
    ] = None,
    model_option: opt.ModelOption = None,
    revision: opt.Revision = None,
    channels: opt.Channels = None,
    as_json: AsJson = False,
) -> None:
    """List the autoencoders, or show one (its weights must be at hand)."""
    if name is None:
        print_value(as_json, registry.available(), show.models)
    else:
        handle = registry.resolve(name, _options(model_option, revision), channels)
        print_value(as_json, handle.spec, show.model)


@app.command()
def demo(
    source: Annotated[str | None, typer.Argument(help="Your own folder of audio.")] = None,
    folder: Annotated[Path, typer.Option("-o", "--output", help="Where to work.")] = Path("demo"),
) -> None:
    """Write a small corpus (or take yours), encode it, mix it in latent space, decode the mix."""
    from latentmill.demo.run import run_demo

    run_demo(folder, source, lambda text: typer.echo(printable_lines(text)))


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _options_of_all(
    # The callback prints: click looks for a command first, and would miss one here.
    show_version: Annotated[
        bool,
        typer.Option(
            "--version", help="Print the version and exit.", is_eager=True, callback=_print_version
        ),
    ] = False,
) -> None:
    # `status` and `info` report it; a Python warning is not for people at a terminal.
    warnings.simplefilter("ignore", IncompleteStoreWarning)


@app.command()
def version() -> None:
    """Print the version."""
    _print_version(True)


def _settings(options: Mapping[str, Any]) -> RunConfig:
    """The settings of a command that has the options of `encode`."""
    model_options = _options(options["model_option"], options["revision"])
    given = {**options, "model_options": model_options}
    for name in ("config", "model_option", "revision", "trust_model", "as_json"):
        del given[name]
    return load_config(options["config"], given, trust_model=options["trust_model"])


def _options(pairs: list[str] | None, revision: str | None) -> dict[str, Any] | None:
    """`name=value` options; a value is read as YAML, so that numbers are numbers."""
    import yaml

    options: dict[str, Any] = {} if revision is None else {"revision": revision}
    for pair in pairs or []:
        name, equals, value = pair.partition("=")
        if not equals:
            raise ConfigError(f"Model option {pair!r} must be NAME=VALUE.")
        try:
            options[name] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise ConfigError(f"Model option {pair!r}: its value is no valid YAML.") from error
    return options or None


if __name__ == "__main__":
    main()
