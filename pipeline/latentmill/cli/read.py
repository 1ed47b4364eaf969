"""The commands mix and export, and what several commands that read a store have in common."""

from __future__ import annotations

import contextlib
import math
import re
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TextIO

import typer

from latentmill.cli.entry import interrupts_raise
from latentmill.cli.log import Commands
from latentmill.errors import ITEMS_FAILED_EXIT_CODE, ConfigError, StorageError
from latentmill.text.log import get_logger
from latentmill.text.printing import printable_json, printable_value

if TYPE_CHECKING:
    from latentmill.decoding.decoder import LatentSource
    from latentmill.store.store import LatentStore

_log = get_logger("cli")
app = Commands()  # app.py adds its commands to the main app

Store = Annotated[str, typer.Argument(metavar="STORE", help="Store to read: a folder or URL.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Device = Annotated[
    str, typer.Option(help="Device of the model: auto, cpu, cuda or cuda:N, e.g. cuda:1.")
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace existing files.")]
TrustModel = Annotated[
    bool,
    typer.Option(
        "--trust-model",
        help="Run the Python code of a model that is not built in, if the store or its config "
        "specifies one. Use it only for stores that you trust.",
    ),
]
ModelOption = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME=VALUE",
        help="Option of the model that changes only decoding, e.g. diffusion_steps=4. Repeatable. "
        "\\[default: as encoded]",
    ),
]
Seed = Annotated[int, typer.Option(help="Seed of the noise, for decoders that draw noise.")]


def print_value(as_json: bool, value: Any, text: Callable[[Any], str]) -> None:
    from latentmill.cli import show

    typer.echo(printable_json(show.plain(value)) if as_json else text(printable_value(value)))


def parsed_options(pairs: list[str] | None) -> dict[str, Any]:
    """Parse `NAME=VALUE` options of a model; values are YAML, so that numbers become numbers.

    What YAML reads as a mapping, a list or a date stays text, because no option has such values.
    """
    import yaml

    options: dict[str, Any] = {}
    for pair in pairs or []:
        name, equals, value = pair.partition("=")
        if not equals:
            raise ConfigError(f"invalid --model-option {pair!r}: expected NAME=VALUE.")
        try:
            parsed = yaml.safe_load(value)
            options[name] = parsed if isinstance(parsed, str | float | int | None) else value
        except yaml.YAMLError as error:
            raise ConfigError(
                f"invalid --model-option {pair!r}: the value is not valid YAML."
            ) from error
    return options


def parsed_fields(pairs: list[str] | None) -> dict[str, str] | None:
    """Parse `NAME=MODEL` of fields; None if there are none."""
    fields: dict[str, str] = {}
    for pair in pairs or []:
        name, equals, model = pair.partition("=")
        if not equals or name in fields:
            wrong = "each field once" if equals else "NAME=MODEL"
            raise ConfigError(f"invalid --with {pair!r}: expected {wrong}.")
        fields[name] = model
    return fields or None


def open_to_decode(
    url: str, device: str, trust_model: bool, model_option: list[str] | None
) -> LatentStore:
    """Open a store whose records are decoded."""
    from latentmill.store.store import open_store

    options = parsed_options(model_option)
    return open_store(url, device=device, trust_model=trust_model, model_options=options)


@app.command()
def mix(
    url: Store,
    parts: Annotated[
        list[str],
        typer.Argument(
            metavar="KEY[:GAIN]...",
            help="Records to mix, each with an optional gain: bass, bass:0.5 or bass:-6dB.",
        ),
    ],
    file: Annotated[Path, typer.Option("-o", "--output", help="File to write, .wav or .flac.")],
    length: Annotated[
        str | None,
        typer.Option(
            help="Required if the lengths differ: shortest (cuts the others), or longest (adds "
            "silence)."
        ),
    ] = None,
    overwrite: Overwrite = False,
    raw: Annotated[
        bool, typer.Option("--raw", help="Add the latents without the origin correction.")
    ] = False,
    seed: Seed = 0,
    device: Device = "auto",
    trust_model: TrustModel = False,
    model_option: ModelOption = None,
    as_json: AsJson = False,
) -> None:
    """Mix records in latent space and decode the mix to a WAV or FLAC file."""
    from latentmill.cli import show
    from latentmill.decoding.files import check_file_type, fitted, mixed

    check_file_type(file)
    store = open_to_decode(url, device, trust_model, model_option)
    wanted = [_key_and_gain(store, part) for part in parts]
    check_target(file, store, overwrite, [key for key, _ in wanted])
    origin = store.origin.raw() if raw else store.origin
    origin.check_arithmetic()
    sources = [store.source(key) for key, _ in wanted]
    samples = [store.entry(key).num_samples for key, _ in wanted]
    choose = {None: max, "longest": max, "shortest": min}.get(length)
    if choose is None:
        raise ConfigError(f"invalid --length {length!r}: use shortest or longest.")
    if length is None and len({source.shape[-1] for source in sources}) > 1:
        rate = store.info.model["sample_rate"]
        listed = ", ".join(
            f"{key} {n / rate:.2f} s" for (key, _), n in zip(wanted, samples, strict=True)
        )
        raise ConfigError(
            f"the records have different lengths ({listed}): add --length shortest to cut them, "
            "or --length longest to pad them with silence."
        )
    if length is not None:
        frames = choose(source.shape[-1] for source in sources)
        sources = [fitted(source, frames, origin=origin) for source in sources]
    mixture = mixed(sources, [gain for _, gain in wanted], origin=origin)
    interrupts_raise()
    with _linearity_warnings_logged():
        written = write_decoded(file, store, mixture, choose(samples), seed)
    print_value(as_json, {"files": [written]}, show.files)


@app.command()
def export(
    url: Store,
    dest: Annotated[
        str,
        typer.Argument(
            metavar="DEST", help="Folder or URL to write; new, or an earlier export of this store."
        ),
    ],
    to: Annotated[
        str,
        typer.Option(
            "--to", help="Target format: stable-audio-tools, ltx2, ace-step, webdataset or parquet."
        ),
    ],
    frames: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Pad shorter latents with silence to this many frames (stable-audio-tools only).",
        ),
    ] = None,
    fields: Annotated[
        str,
        typer.Option(
            help="Fields to export, separated by commas: NAME, or ROLE=NAME if a format has "
            "several roles for its kind (ltx2 and ace-step only)."
        ),
    ] = "",
    as_json: AsJson = False,
) -> int:
    """Write STORE for the trainer of another project, or as a store in the other shard format."""
    from latentmill.cli import show
    from latentmill.export.export import Target, export_store
    from latentmill.store.store import open_store

    try:
        target = Target(to)
    except ValueError:
        names = ", ".join(Target)
        raise ConfigError(f"invalid --to {to!r}: use one of {names}.") from None
    interrupts_raise()
    names_of_fields = [name.strip() for name in fields.split(",") if name.strip()]
    summary = export_store(open_store(url), dest, target, frames=frames, fields=names_of_fields)
    print_value(as_json, summary, show.export)
    return ITEMS_FAILED_EXIT_CODE if summary.failures else 0


def _key_and_gain(store: LatentStore, text: str) -> tuple[str, float]:
    """Split `KEY`, `KEY:FACTOR` or `KEY:-6dB`; a key may contain colons."""
    key, _, gain = text.rpartition(":")
    if text in store or key not in store:
        check_key(store, text)
        return text, 1.0
    number, decibels = re.subn(r"\s*db\s*$", "", gain, flags=re.IGNORECASE)
    try:
        factor = 10 ** (float(number) / 20) if decibels else float(number)
    except (ValueError, OverflowError):
        factor = math.nan
    if not math.isfinite(factor):
        raise ConfigError(
            f"invalid gain {gain!r} of {key}: use a factor such as {key}:0.5, "
            f"or decibels such as {key}:-6dB."
        )
    return key, factor


def check_key(store: LatentStore, key: str) -> None:
    if key not in store:
        from latentmill.cli import show

        near = show.closest(key, store.keys())
        hint = f"did you mean {near}?" if near else "check the key."
        raise ConfigError(f"{store.url} has no record {key}: {hint}")


def check_target(
    path: Path,
    store: LatentStore,
    overwrite: bool,
    keys: Iterable[str],
    advice: str = "add --overwrite",
) -> None:
    """Refuse to overwrite files, above all the source audio of the records `keys`."""
    from latentmill.storage.scratch import check_replaceable

    folder = Path(store.info.source).resolve()
    if path.resolve().is_relative_to(folder):
        raise ConfigError(
            f"{path} is inside the source of {store.url}: choose another output path."
        )
    check_replaceable(path)
    if path.exists() and not overwrite:
        raise ConfigError(f"{path} exists: choose another output path, or {advice}.")
    if folder.is_dir() or not path.exists():
        return
    if any(_is_source(path, store, key) for key in keys):  # a manifest, for example
        raise ConfigError(f"{path} is source audio of {store.url}: choose another output path.")


def _is_source(path: Path, store: LatentStore, key: str) -> bool:
    from latentmill.audio.media import path_of_file_url
    from latentmill.sources.address import item_at

    # The source is not on this machine any more, or the record is damaged, which `decode` reports.
    with contextlib.suppress(OSError, ValueError, StorageError):
        file = item_at(store[key].source_uri).uri
        return path.samefile(path_of_file_url(file) if file.startswith("file://") else file)
    return False


def write_decoded(
    path: Path, store: LatentStore, source: LatentSource, samples: int, seed: int
) -> str:
    """Decode to a file; warn if its format clips the loudest samples."""
    from latentmill.decoding.files import write_audio

    written = write_audio(
        path,
        store.decode_blocks(source, samples, seed=seed),
        sample_rate=store.info.model["sample_rate"],
        channels=store.model().spec.channels,
        num_samples=samples,
    )
    if written.clipped:
        _log.warning(
            "%s: clipped %d samples (peak %+.2f dBFS); write .wav to keep them",
            path,
            written.clipped,
            20 * math.log10(written.peak),
        )
    return written.path


@contextlib.contextmanager
def _linearity_warnings_logged() -> Iterator[None]:
    """Log each linearity warning once."""
    from latentmill.ops import LinearityWarning

    def line(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        if issubclass(category, LinearityWarning):
            _log.warning("%s", message)
        else:
            before(message, category, filename, lineno, file, line)

    with warnings.catch_warnings():
        before = warnings.showwarning
        warnings.simplefilter("once", LinearityWarning)
        warnings.showwarning = line
        yield
