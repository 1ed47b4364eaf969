"""The options of `encode`, which `plan` takes, too: one line each, None where it is not given."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

MODEL = "Model"
SOURCE = "Source"
FILTERS = "Filters"
PLAN = "Plan"
MACHINES = "Machines"

Command = Callable[..., Any]


def _one(kind: Any, text: str, panel: str | None = None) -> Any:
    return Annotated[kind | None, typer.Option(help=text, rich_help_panel=panel)]


def _many(text: str, panel: str | None = None) -> Any:
    return _one(list[str], text, panel)


def _flag(name: str, text: str, panel: str | None = None) -> Any:
    return Annotated[bool | None, typer.Option(name, help=text, rich_help_panel=panel)]


def _argument(name: str, text: str) -> Any:
    return Annotated[str | None, typer.Argument(metavar=name, help=text)]


ModelOption = Annotated[
    list[str] | None,
    typer.Option(help="NAME=VALUE, such as scale_factor=20; repeatable.", rich_help_panel=MODEL),
]
Revision = Annotated[
    str | None,
    typer.Option(
        help="Branch, tag or commit of the weights' hub repository.", rich_help_panel=MODEL
    ),
]
Channels = Annotated[
    str | None,
    typer.Option(
        help="mono, or split: a mono model on each channel of stereo.", rich_help_panel=MODEL
    ),
]

ENCODE: dict[str, Any] = {
    "source": _argument("SOURCE", "Folder, manifest, tars, Parquet; any URL."),
    "out": _argument("STORE", "Store to write or resume: a folder or URL."),
    "config": _one(Path, "YAML file; options win over it."),
    "format": _one(str, "parquet (default) or webdataset."),
    "dtype": _one(str, "float16 (default) or float32."),
    "log_format": _one(str, "text (default), or json: one object per line on stderr."),
    "model": _one(str, "Autoencoder (default: mdct).", MODEL),
    "model_option": ModelOption,
    "revision": Revision,
    "channels": Channels,
    "precision": _one(str, "float32, tf32, bf16 or fp16 (default: by the device).", MODEL),
    "compile": _flag("--compile", "Encode full batches by torch.compile.", MODEL),
    "stitch": _one(str, "trim, crossfade or none.", MODEL),
    "chunk_seconds": _one(float, "Chunk length.", MODEL),
    "chunk_samples": _one(int, "The same, exactly.", MODEL),
    "overlap": _one(float, "Shared part of a chunk, 0-0.5.", MODEL),
    "source_type": _one(str, "folder, manifest, webdataset or parquet (default: by name).", SOURCE),
    "include": _many("Glob over a folder's paths, such as '*/vocals.*'.", SOURCE),
    "exclude": _many("The same for what to leave.", SOURCE),
    "extensions": _many("File name extension of audio.", SOURCE),
    "path_column": _one(str, "A manifest's column of paths.", SOURCE),
    "start_column": _one(str, "Its column of starts, in seconds.", SOURCE),
    "duration_column": _one(str, "Its column of durations.", SOURCE),
    "key_column": _one(str, "A table's column of unique names.", SOURCE),
    "audio_column": _one(str, "A Parquet file's column of audio.", SOURCE),
    "group_by": _one(
        str,
        "What belongs together: a regular expression over keys with (?P<group>...) and "
        "(?P<role>...), or metadata:FIELD,FIELD.",
        SOURCE,
    ),
    "allow_truncated": _flag("--allow-truncated", "Keep what truncated files hold.", SOURCE),
    "min_seconds": _one(float, "Skip shorter items.", FILTERS),
    "max_seconds": _one(float, "Skip longer items.", FILTERS),
    "min_rms": _one(float, "Skip softer items, dBFS.", FILTERS),
    "min_sample_rate": _one(int, "Skip lower sample rates.", FILTERS),
    "max_sample_rate": _one(int, "Skip higher sample rates.", FILTERS),
    "min_channels": _one(int, "Skip fewer channels.", FILTERS),
    "max_channels": _one(int, "Skip more channels.", FILTERS),
    "where": _one(
        str, "Skip items whose metadata differ: \"genre == 'rock' and bpm > 100\".", FILTERS
    ),
    "unit_seconds": _one(float, "Audio per shard.", PLAN),
    "shard_size": _one(str, "Its size at most, such as 512MiB (default 1GiB).", PLAN),
    "probe": _flag(
        "--probe/--no-probe",
        "Read the headers of files for their lengths, to plan and estimate exactly. "
        "[default: up to 100,000 local files]",
        PLAN,
    ),
    "retry_failed": _flag("--retry-failed", "Encode units with failed items anew.", PLAN),
    "extend": _flag("--extend", "Add what is new in SOURCE, as new units.", PLAN),
    "retry_changed": _flag("--retry-changed", "With --extend: encode changed files anew.", PLAN),
    "device": _one(str, "auto (default), cpu or cuda.", MACHINES),
    "workers": _one(int, "Models in memory.", MACHINES),
    "threads": _one(int, "CPU threads per worker.", MACHINES),
    "batch_size": _one(int, "Chunks per forward pass.", MACHINES),
    "decode_threads": _one(
        int, "Decoders per worker (2; on a GPU its share of the cores).", MACHINES
    ),
    "decode_tasks": _one(
        int, "Decode a unit in so many Ray tasks on any free CPU cores instead.", MACHINES
    ),
    "decode_timeout": _one(float, "Seconds to decode an item, beyond its length (600).", MACHINES),
    "address": _one(str, "Ray cluster (default: embedded).", MACHINES),
    "stall_minutes": _one(float, "Replace a worker without progress (default 15).", MACHINES),
}


def takes(options: dict[str, Any], **own: tuple[Any, Any]) -> Callable[[Command], Command]:
    """Give a command of keyword arguments these options.

    Args:
        options: The annotation of each; it is None where it is not given.
        own: More of them, each an annotation and a default.
    """
    kinds = {name: (annotation, None) for name, annotation in options.items()} | own

    def decorate(command: Command) -> Command:
        command.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
            [
                inspect.Parameter(
                    name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=kind
                )
                for name, (kind, default) in kinds.items()
            ]
        )
        command.__annotations__ = {name: kind for name, (kind, _) in kinds.items()}
        return command

    return decorate
