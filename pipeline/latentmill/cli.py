"""The command line, thin: each command is a call of the library and a few lines of print."""

from __future__ import annotations

import contextlib
import inspect
import os
import signal
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, NoReturn, get_type_hints

import typer

from latentmill import cli_options as opt
from latentmill import cli_read, show
from latentmill.cli_read import AsJson, Device, Out, print_value
from latentmill.config import RunConfig, load_config
from latentmill.errors import (
    INTERRUPTED_EXIT_CODE,
    ConfigError,
    HeadGoneError,
    LatentmillError,
    VerifyError,
)
from latentmill.forecast import forecast
from latentmill.models import registry
from latentmill.run import run
from latentmill.store.store import open_store
from latentmill.store.verify import verify as verify_store
from latentmill.version import __version__

app = typer.Typer(
    help="Audio corpora to latent datasets, and back.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
app.add_typer(cli_read.app)

ModelOption = Annotated[
    list[str] | None, typer.Option(help="NAME=VALUE, such as scale_factor=20; repeatable.")
]


def main() -> NoReturn:
    """Run the command line; errors of ours become one sentence and their exit code."""
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        code = app(standalone_mode=False)
        if code == INTERRUPTED_EXIT_CODE:  # as typer passes on a KeyboardInterrupt
            raise KeyboardInterrupt
    except LatentmillError as error:
        print(f"latentmill: {error}", file=sys.stderr, flush=True)  # noqa: T201
        if isinstance(error, HeadGoneError):  # Ray would wait for it, and end the process with 1
            os._exit(error.exit_code)
        sys.exit(error.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        print("latentmill: interrupted; the same command resumes", file=sys.stderr)  # noqa: T201
        sys.exit(INTERRUPTED_EXIT_CODE)
    except Exception as error:
        if hasattr(error, "format_message") and hasattr(error, "exit_code"):  # wrong usage
            if message := error.format_message():
                print(f"latentmill: {message}", file=sys.stderr)  # noqa: T201
            sys.exit(error.exit_code)
        raise
    sys.exit(code if isinstance(code, int) else 0)


def _interrupt(signum: int, frame: object) -> NoReturn:
    raise KeyboardInterrupt


@app.command()
def encode(
    source: Annotated[
        str | None,
        typer.Argument(metavar="SOURCE", help="Folder, manifest, tars, Parquet; any URL."),
    ] = None,
    out: Annotated[
        str | None, typer.Argument(metavar="OUT", help="The store to write or resume.")
    ] = None,
    config: Annotated[Path | None, typer.Option(help="YAML file; options win over it.")] = None,
    model: Annotated[str | None, typer.Option(help="Autoencoder (default: mdct).")] = None,
    model_option: ModelOption = None,
    channels: Annotated[
        str | None, typer.Option(help="mono, or split: a mono model on each channel of stereo.")
    ] = None,
    format: Annotated[str | None, typer.Option(help="parquet (default) or webdataset.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float16 (default) or float32.")] = None,
    precision: Annotated[
        str | None, typer.Option(help="float32, tf32, bf16 or fp16 (default: by the device).")
    ] = None,
    compile: Annotated[
        bool | None, typer.Option("--compile", help="Encode full batches by torch.compile.")
    ] = None,
    stitch: Annotated[str | None, typer.Option(help="trim, crossfade or none.")] = None,
    chunk_seconds: Annotated[float | None, typer.Option(help="Chunk length.")] = None,
    chunk_samples: Annotated[int | None, typer.Option(help="The same, exactly.")] = None,
    overlap: Annotated[float | None, typer.Option(help="Shared part of a chunk, 0-0.5.")] = None,
    allow_truncated: Annotated[
        bool | None, typer.Option("--allow-truncated", help="Keep what truncated files hold.")
    ] = None,
    source_type: opt.SourceType = None,
    include: opt.Include = None,
    exclude: opt.Exclude = None,
    extensions: opt.Extensions = None,
    path_column: opt.PathColumn = None,
    start_column: opt.StartColumn = None,
    duration_column: opt.DurationColumn = None,
    key_column: opt.KeyColumn = None,
    audio_column: opt.AudioColumn = None,
    group_by: opt.GroupBy = None,
    min_seconds: opt.MinSeconds = None,
    max_seconds: opt.MaxSeconds = None,
    min_rms: opt.MinRms = None,
    min_sample_rate: opt.MinSampleRate = None,
    max_sample_rate: opt.MaxSampleRate = None,
    min_channels: opt.MinChannels = None,
    max_channels: opt.MaxChannels = None,
    where: opt.Where = None,
    retry_failed: Annotated[
        bool | None, typer.Option("--retry-failed", help="Encode units with failed items anew.")
    ] = None,
    extend: Annotated[
        bool | None, typer.Option("--extend", help="Add what is new in SOURCE, as new units.")
    ] = None,
    retry_changed: Annotated[
        bool | None,
        typer.Option("--retry-changed", help="With --extend: encode changed files anew."),
    ] = None,
    probe: Annotated[
        bool | None, typer.Option("--probe", help="Read headers for lengths that are not known.")
    ] = None,
    unit_seconds: Annotated[float | None, typer.Option(help="Audio per shard.")] = None,
    shard_size: Annotated[
        str | None, typer.Option(help="Its size at most, such as 512MiB (default 1GiB).")
    ] = None,
    device: Annotated[str | None, typer.Option(help="auto (default), cpu or cuda.")] = None,
    workers: Annotated[int | None, typer.Option(help="Models in memory.")] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads per worker.")] = None,
    decode_threads: Annotated[int | None, typer.Option(help="Decoders per worker.")] = None,
    decode_timeout: Annotated[
        float | None, typer.Option(help="Seconds to decode an item, beyond its length (600).")
    ] = None,
    batch_size: Annotated[int | None, typer.Option(help="Chunks per forward pass.")] = None,
    address: Annotated[str | None, typer.Option(help="Ray cluster (default: embedded).")] = None,
    stall_minutes: Annotated[
        float | None, typer.Option(help="Replace a worker without progress (default 15).")
    ] = None,
    log_format: Annotated[
        str | None, typer.Option(help="text (default), or json: one object per line on stderr.")
    ] = None,
    as_json: AsJson = False,
) -> int:
    """Encode SOURCE into the store OUT; the same command again resumes it."""
    settings = _settings(locals())
    with contextlib.redirect_stdout(sys.stderr):  # where Ray may complain of a lost worker
        summary = run(settings, show.progress(settings.log_format))
    print_value(as_json, summary, show.summary)
    return summary.exit_code


def plan(**options: Any) -> None:
    """Freeze the plan that `encode` with the same settings resumes, and say what it comes to."""
    calibrated = options.pop("calibrate")
    settings = _settings(options)
    with contextlib.redirect_stdout(sys.stderr):
        value = forecast(settings, show.progress(settings.log_format), calibrated=calibrated)
    print_value(options["as_json"], value, show.forecast)


def _like_encode(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the options of `encode`, and --no-calibrate."""
    hints = get_type_hints(encode, include_extras=True)
    given = [
        parameter.replace(annotation=hints[name])
        for name, parameter in inspect.signature(encode).parameters.items()
    ]
    calibrate = inspect.Parameter(
        "calibrate",
        inspect.Parameter.KEYWORD_ONLY,
        default=True,
        annotation=Annotated[bool, typer.Option(help="Encode a few chunks to estimate the time.")],
    )
    parameters = [*given, calibrate]
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {one.name: one.annotation for one in parameters}
    return command


app.command()(_like_encode(plan))


@app.command()
def status(out: Out, as_json: AsJson = False) -> None:
    """Say how far a store is: units, items, failures. Needs no Ray."""
    print_value(as_json, show.StoreStatus.of(open_store(out)), show.status)


@app.command()
def info(out: Out, as_json: AsJson = False) -> None:
    """Say what a store is: model, format, rates, hours, statistics."""
    print_value(as_json, open_store(out).info, show.info)


@app.command()
def verify(
    out: Out,
    decode: Annotated[int, typer.Option(min=0, help="Decode N records back to audio.")] = 0,
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Check hashes, counts, numbers; exit code 8 if the store is not whole."""
    report = verify_store(open_store(out, device=device), decode=decode)
    print_value(as_json, report, show.verification)
    if report.faults:
        raise VerifyError(f"{len(report.faults)} faults in {out}, the first: {report.faults[0]}.")


@app.command()
def models(
    name: Annotated[
        str | None, typer.Argument(help="One model: its lengths and stitching.")
    ] = None,
    model_option: ModelOption = None,
    channels: Annotated[str | None, typer.Option(help="mono or split, as of encode.")] = None,
    as_json: AsJson = False,
) -> None:
    """List the autoencoders, or show one (its weights must be at hand)."""
    if name is None:
        print_value(as_json, registry.available(), show.models)
    else:
        handle = registry.resolve(name, _options(model_option), channels)
        print_value(as_json, handle.spec, show.model)


@app.command()
def demo(
    source: Annotated[str | None, typer.Argument(help="Your own folder of audio.")] = None,
    folder: Annotated[Path, typer.Option("-o", "--output", help="Where to work.")] = Path("demo"),
) -> None:
    """Write a small corpus (or take yours), encode it, mix it in latent space, decode the mix."""
    from latentmill.demo.run import run_demo

    run_demo(folder, source, typer.echo)


@app.callback(no_args_is_help=True)
def _options_of_all(
    show_version: Annotated[
        bool, typer.Option("--version", help="Print the version.", is_eager=True)
    ] = False,
) -> None:
    if show_version:
        typer.echo(__version__)
        raise typer.Exit


@app.command()
def version() -> None:
    """Print the version."""
    typer.echo(__version__)


def _settings(options: Mapping[str, Any]) -> RunConfig:
    """The settings of a command that has the options of `encode`."""
    given = {**options, "model_options": _options(options["model_option"])}
    for name in ("config", "model_option", "as_json"):
        del given[name]
    return load_config(options["config"], given)


def _options(pairs: list[str] | None) -> dict[str, Any] | None:
    """`name=value` options; a value is read as YAML, so that numbers are numbers."""
    import yaml

    options = {}
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
