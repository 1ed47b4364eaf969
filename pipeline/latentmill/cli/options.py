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
    "source": _argument(
        "SOURCE", "Folder, manifest, WebDataset tars or Parquet files: a path or URL."
    ),
    "out": _argument("STORE", "Store to write or resume: a folder or URL."),
    "config": _one(Path, "YAML file of settings; options on the command line override it."),
    "format": _one(str, "parquet (default) or webdataset."),
    "dtype": _one(str, "float16 (default) or float32."),
    "log_format": _one(str, "text (default), or json: one object per line on stderr."),
    "model": _one(str, "Autoencoder, see `latentmill models`. [default: mdct]", MODEL),
    "model_option": ModelOption,
    "revision": Revision,
    "channels": Channels,
    "precision": _one(str, "float32, tf32, bf16 or fp16 (default: by the device).", MODEL),
    "compile": _flag("--compile", "Encode full batches by torch.compile.", MODEL),
    "stitch": _one(str, "trim, crossfade or none.", MODEL),
    "chunk_seconds": _one(float, "Chunk length in seconds. [default: the model's]", MODEL),
    "chunk_samples": _one(int, "Chunk length in samples. Overrides --chunk-seconds.", MODEL),
    "overlap": _one(float, "Fraction of a chunk that the next one repeats, 0 to 0.5.", MODEL),
    "source_type": _one(str, "folder, manifest, webdataset or parquet (default: by name).", SOURCE),
    "include": _many("Glob of paths to take, e.g. '*/vocals.*'. Repeatable.", SOURCE),
    "exclude": _many("Glob of paths to skip, e.g. '*/drafts/*'. Repeatable.", SOURCE),
    "extensions": _many("Extension of files to take, e.g. .wav. Repeatable.", SOURCE),
    "path_column": _one(str, "Manifest column that holds the paths.", SOURCE),
    "start_column": _one(str, "Manifest column of segment starts, in seconds.", SOURCE),
    "duration_column": _one(str, "Manifest column of segment durations, in seconds.", SOURCE),
    "key_column": _one(str, "Manifest or Parquet column of unique names.", SOURCE),
    "audio_column": _one(str, "Parquet column that holds the audio.", SOURCE),
    "group_by": _one(
        str,
        "Put items that belong together, such as stems, in one group: a regular expression over "
        "keys with (?P<group>...) and (?P<role>...), or metadata:FIELD,FIELD.",
        SOURCE,
    ),
    "allow_truncated": _flag(
        "--allow-truncated",
        "Encode the readable part of truncated files instead of failing them.",
        SOURCE,
    ),
    "min_seconds": _one(float, "Skip items shorter than this many seconds.", FILTERS),
    "max_seconds": _one(float, "Skip items longer than this many seconds.", FILTERS),
    "min_rms": _one(float, "Skip items with an RMS level below this, in dBFS, e.g. -60.", FILTERS),
    "min_sample_rate": _one(int, "Skip items with a sample rate below this, in Hz.", FILTERS),
    "max_sample_rate": _one(int, "Skip items with a sample rate above this, in Hz.", FILTERS),
    "min_channels": _one(int, "Skip items with fewer channels.", FILTERS),
    "max_channels": _one(int, "Skip items with more channels.", FILTERS),
    "where": _one(
        str,
        "Skip items whose metadata do not match, e.g. \"genre == 'rock' and bpm > 100\".",
        FILTERS,
    ),
    "unit_seconds": _one(float, "Seconds of audio per shard. [default: by corpus size]", PLAN),
    "shard_size": _one(str, "Maximum shard size (estimated), e.g. 512MiB. [default: 1GiB]", PLAN),
    "probe": _flag(
        "--probe/--no-probe",
        "Read the headers of files for their lengths, to plan and estimate exactly. "
        "[default: up to 100,000 local files]",
        PLAN,
    ),
    "retry_failed": _flag(
        "--retry-failed", "Encode the shards that have failed items again.", PLAN
    ),
    "extend": _flag("--extend", "Add new files of SOURCE to the store.", PLAN),
    "retry_changed": _flag("--retry-changed", "With --extend: encode changed files again.", PLAN),
    "device": _one(str, "auto (default), cpu or cuda.", MACHINES),
    "workers": _one(
        int, "Number of workers; each loads one copy of the model. [default: one per GPU]", MACHINES
    ),
    "threads": _one(int, "CPU threads per worker.", MACHINES),
    "batch_size": _one(int, "Chunks per forward pass.", MACHINES),
    "decode_threads": _one(
        int,
        "Threads per worker that load audio. [default: 2; on a GPU its share of the cores]",
        MACHINES,
    ),
    "decode_tasks": _one(
        int,
        "Load audio in this many Ray tasks per shard, on any node, instead of threads.",
        MACHINES,
    ),
    "decode_timeout": _one(
        float,
        "Time limit for loading an item: its length plus this many seconds. [default: 600]",
        MACHINES,
    ),
    "address": _one(
        str, "Address of a Ray cluster. [default: RAY_ADDRESS, else embedded Ray]", MACHINES
    ),
    "stall_minutes": _one(
        float, "Replace a worker after this many minutes without progress. [default: 15]", MACHINES
    ),
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
