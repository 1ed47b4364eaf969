"""The command line, thin: each command is a call of the library and a few lines of print."""

from __future__ import annotations

import contextlib
import json
import math
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, NoReturn

import soundfile
import typer

from latentmill import show
from latentmill.config import load_config
from latentmill.decode import Audio
from latentmill.errors import (
    INTERRUPTED_EXIT_CODE,
    ConfigError,
    LatentmillError,
    StorageError,
    VerifyError,
)
from latentmill.models import registry
from latentmill.ops import fit
from latentmill.ops import mix as mix_latents
from latentmill.run import run
from latentmill.seams import measure_seams
from latentmill.store.store import LatentStore, open_store
from latentmill.store.verify import verify as verify_store
from latentmill.version import __version__

app = typer.Typer(
    help="Audio corpora to latent datasets, and back.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)

Out = Annotated[str, typer.Argument(metavar="OUT", help="The store: a folder or fsspec URL.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for machines.")]
ModelOption = Annotated[
    list[str] | None, typer.Option(help="NAME=VALUE, such as scale_factor=20; repeatable.")
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace files that exist.")]
Seed = Annotated[int, typer.Option(help="Noise of a stochastic decoder.")]


def main() -> NoReturn:
    """Run the command line; errors of ours become one sentence and their exit code."""
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        code = app(standalone_mode=False)
        if code == INTERRUPTED_EXIT_CODE:  # as typer passes on a KeyboardInterrupt
            raise KeyboardInterrupt
    except LatentmillError as error:
        print(f"latentmill: {error}", file=sys.stderr)  # noqa: T201
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


def _print(as_json: bool, value: Any, text: Callable[[Any], str]) -> None:
    typer.echo(json.dumps(show.plain(value), ensure_ascii=False) if as_json else text(value))


@app.command()
def encode(
    source: Annotated[
        str | None, typer.Argument(metavar="SOURCE", help="Folder or fsspec URL of audio.")
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
    stitch: Annotated[str | None, typer.Option(help="trim, crossfade or none.")] = None,
    chunk_seconds: Annotated[float | None, typer.Option(help="Chunk length.")] = None,
    chunk_samples: Annotated[int | None, typer.Option(help="The same, exactly.")] = None,
    overlap: Annotated[float | None, typer.Option(help="Shared part of a chunk, 0-0.5.")] = None,
    allow_truncated: Annotated[
        bool | None, typer.Option("--allow-truncated", help="Keep what truncated files hold.")
    ] = None,
    min_seconds: Annotated[float | None, typer.Option(help="Skip shorter items.")] = None,
    max_seconds: Annotated[float | None, typer.Option(help="Skip longer items.")] = None,
    retry_failed: Annotated[
        bool | None, typer.Option("--retry-failed", help="Encode units with failed items anew.")
    ] = None,
    unit_seconds: Annotated[float | None, typer.Option(help="Audio per shard.")] = None,
    device: Annotated[str | None, typer.Option(help="auto (default), cpu or cuda.")] = None,
    workers: Annotated[int | None, typer.Option(help="Models in memory.")] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads per worker.")] = None,
    decode_threads: Annotated[int | None, typer.Option(help="Decoders per worker.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Chunks per forward pass.")] = None,
    address: Annotated[str | None, typer.Option(help="Ray cluster (default: embedded).")] = None,
    as_json: AsJson = False,
) -> int:
    """Encode SOURCE into the store OUT; the same command again resumes it."""
    options = {**locals(), "model_options": _options(model_option)}
    for name in ("config", "model_option", "as_json"):
        del options[name]
    settings = load_config(config, options)
    with contextlib.redirect_stdout(sys.stderr):  # where Ray may complain of a lost worker
        summary = run(settings, show.progress())
    _print(as_json, summary, show.summary)
    return summary.exit_code


@app.command()
def status(out: Out, as_json: AsJson = False) -> None:
    """Say how far a store is: units, items, failures. Needs no Ray."""
    _print(as_json, show.StoreStatus.of(open_store(out)), show.status)


@app.command()
def info(out: Out, as_json: AsJson = False) -> None:
    """Say what a store is: model, format, rates, hours, statistics."""
    _print(as_json, open_store(out).info, show.info)


@app.command()
def verify(
    out: Out,
    decode: Annotated[int, typer.Option(min=0, help="Decode N records back to audio.")] = 0,
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Check hashes, counts, numbers; exit code 8 if the store is not whole."""
    report = verify_store(open_store(out, device=device), decode=decode)
    _print(as_json, report, show.verification)
    if report.faults:
        raise VerifyError(f"{len(report.faults)} faults in {out}, the first: {report.faults[0]}.")


@app.command()
def decode(
    out: Out,
    keys: Annotated[list[str], typer.Argument(metavar="KEY...", help="Records to decode.")],
    folder: Annotated[Path, typer.Option("-o", "--output", help="Folder for the WAV files.")],
    overwrite: Overwrite = False,
    seed: Seed = 0,
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Decode records to WAV files, FOLDER/KEY.wav."""
    store = open_store(out, device=device)
    targets = {key: folder / f"{_safe(key)}.wav" for key in keys}
    for key, path in targets.items():
        _check_key(store, key)
        _check_target(path, store, overwrite)
    written = [_write(path, store.decode(key, seed=seed), store) for key, path in targets.items()]
    _print(as_json, {"files": written}, show.files)


@app.command()
def mix(
    out: Out,
    parts: Annotated[list[str], typer.Argument(metavar="KEY[:GAIN]...", help="What to mix.")],
    file: Annotated[Path, typer.Option("-o", "--output", help="The WAV file to write.")],
    length: Annotated[
        str | None, typer.Option(help="shortest or longest, where the records differ.")
    ] = None,
    overwrite: Overwrite = False,
    raw: Annotated[bool, typer.Option("--raw", help="Plain sum, without the origin.")] = False,
    seed: Seed = 0,
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Mix records in latent space and decode the mix to a WAV file."""
    if file.suffix.lower() != ".wav":
        raise ConfigError(f"Output {file}: name a .wav file.")
    store = open_store(out, device=device)
    _check_target(file, store, overwrite)
    wanted = [_part(store, part) for part in parts]
    records = [store[key] for key, _ in wanted]
    latents, samples = [record.latent for record in records], [r.num_samples for r in records]
    origin = None if raw else store.origin
    choose = {None: max, "longest": max, "shortest": min}.get(length)
    if choose is None:
        raise ConfigError(f"Option --length {length}: it is shortest or longest.")
    if length is not None:
        frames = choose(record.frames for record in records)
        latents = [fit(latent, frames, origin=origin) for latent in latents]
    mixed = mix_latents(latents, [gain for _, gain in wanted], origin=origin)
    written = _write(file, store.decode_latent(mixed, choose(samples), seed=seed), store)
    _print(as_json, {"files": [written]}, show.files)


@app.command()
def seams(
    out: Out,
    items: Annotated[int, typer.Option(min=1, help="How many items to encode whole.")] = 8,
    max_seconds: Annotated[float, typer.Option(help="Longest of them.")] = 60.0,
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Measure the error at the seams of chunks against whole items; goes into dataset.json."""
    store = open_store(out, device=device)
    _print(as_json, measure_seams(store, items=items, max_seconds=max_seconds), show.seams)


@app.command()
def models(
    name: Annotated[
        str | None, typer.Argument(help="One model: its lengths and stitching.")
    ] = None,
    model_option: ModelOption = None,
    as_json: AsJson = False,
) -> None:
    """List the autoencoders, or show one (its weights must be at hand)."""
    if name is None:
        _print(as_json, registry.available(), show.models)
    else:
        _print(as_json, registry.resolve(name, _options(model_option)).spec, show.model)


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


def _part(store: LatentStore, part: str) -> tuple[str, float]:
    """`KEY` or `KEY:GAIN`; a key may hold colons itself."""
    key, _, gain = part.rpartition(":")
    if part in store or key not in store:
        _check_key(store, part)
        return part, 1.0
    try:
        factor = float(gain)
    except ValueError:
        factor = math.nan
    if not math.isfinite(factor):
        raise ConfigError(
            f"Gain {gain!r} of {key} is no number: write KEY:GAIN, such as {key}:0.5."
        )
    return key, factor


def _check_key(store: LatentStore, key: str) -> None:
    if key not in store:
        near = show.closest(key, store.keys())
        hint = f"did you mean {near}?" if near else f"`latentmill status {store.url}` counts them."
        raise ConfigError(f"{store.url} has no record {key}: {hint}")


def _safe(key: str) -> str:
    """A key as a relative path that stays below its folder."""
    return "/".join(part for part in key.split("/") if part not in ("", ".", ".."))


def _check_target(path: Path, store: LatentStore, overwrite: bool) -> None:
    """A recording must not be lost to its own copy."""
    if path.resolve().is_relative_to(Path(store.info.source)):
        raise ConfigError(f"Output {path} lies in the source of {store.url}: choose another place.")
    if path.exists() and not overwrite:
        raise ConfigError(f"Output {path} exists: choose another place, or add --overwrite.")


def _write(path: Path, audio: Audio, store: LatentStore) -> str:
    rate = store.info.model["sample_rate"]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(path, audio.T, rate, subtype="FLOAT")
    except (OSError, soundfile.LibsndfileError) as error:
        cause = getattr(error, "strerror", None) or str(error)
        raise StorageError(f"Cannot write {path}: {cause}.") from error
    return str(path)


if __name__ == "__main__":
    main()
