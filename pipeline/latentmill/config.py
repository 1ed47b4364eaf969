"""What a user may set, and the rule of the fingerprint.

The fingerprint covers everything that changes the latents. It is built from the whole
configuration less `OPERATIONAL`, the settings that only change how fast or where a run works.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ByteSize, ConfigDict, Field, ValidationError
from pydantic_core import ErrorDetails

from latentmill.audio.formats import AUDIO_EXTENSIONS
from latentmill.encoding.chunks import Chunking
from latentmill.errors import ConfigError
from latentmill.models.base import Channels, ModelSpec, Stitch
from latentmill.models.inference.precision import Precision
from latentmill.models.trust import CONSENT, check_named, store_of
from latentmill.sources.base import SourceType
from latentmill.sources.filters import RANGES
from latentmill.sources.group import check_rule
from latentmill.sources.open import SOURCE_SETTINGS
from latentmill.sources.where import Condition
from latentmill.text.redact import is_secret_name

# Raised when the same file, model and settings give other latents than before. Stores of another
# version stay readable; resuming or extending one is refused (`version_difference`).
# 2: loading gives what FFmpeg gives, in files where it did not before.
ENCODING_VERSION = 2

# Settings that do not change the latents. All others are part of the fingerprint.
OPERATIONAL = frozenset(
    {
        "source",
        "out",
        "device",
        "workers",
        "threads",
        "decode_threads",
        "decode_tasks",
        "decode_timeout",
        "batch_size",
        "retry_failed",
    }
    | {"unit_seconds", "shard_size", "extensions", "address", "format"}
    | {"extend", "retry_changed", "probe"}
    | {"stall_minutes", "log_format"}
    | SOURCE_SETTINGS
)


class RunConfig(BaseModel):
    """A run: what `latentmill encode` takes as options and `--config FILE` as YAML."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    source: str = Field(
        description="Folder, manifest, WebDataset tars or Parquet files: a path or fsspec URL."
    )
    source_type: SourceType | None = Field(
        None, description="folder, manifest, webdataset or parquet; default by the source's name."
    )
    out: str = Field(description="Folder or fsspec URL of the store.")
    model: str = Field("mdct", description="Name of the autoencoder; `latentmill models` lists.")
    model_options: dict[str, str | int | float | bool | None] = Field(
        default_factory=dict, description="Options of the model, such as scale_factor."
    )
    channels: Channels | None = Field(
        None,
        description="mono or split (a mono model on each channel of stereo); default the model's.",
    )
    format: Literal["parquet", "webdataset"] = Field("parquet", description="Format of a shard.")
    dtype: Literal["float16", "float32"] = Field("float16", description="Stored number format.")
    precision: Precision | None = Field(
        None, description="float32, tf32, bf16 or fp16; default tf32 on GPUs, float32 on CPUs."
    )
    compile: bool = Field(
        False, description="Encode full batches by torch.compile; on GPUs by CUDA graphs, too."
    )
    stitch: Stitch | None = Field(None, description="How chunks become one latent.")
    chunk_seconds: float | None = Field(None, gt=0, description="Chunk length in seconds.")
    chunk_samples: int | None = Field(
        None, ge=1, description="Chunk length in samples, exactly, instead of chunk_seconds."
    )
    overlap: float | None = Field(
        None, ge=0, le=0.5, description="Share of a chunk that the next one repeats."
    )
    allow_truncated: bool = Field(
        False, description="Keep what can be decoded of truncated files instead of failing them."
    )
    min_seconds: float | None = Field(None, ge=0, description="Skip shorter items.")
    max_seconds: float | None = Field(None, gt=0, description="Skip longer items.")
    extensions: tuple[str, ...] = Field(
        AUDIO_EXTENSIONS, description="File name extensions that make a file an item."
    )
    min_rms: float | None = Field(None, le=0, description="Skip softer items, dB of full scale.")
    min_sample_rate: int | None = Field(None, ge=1, description="Skip recordings of lower rates.")
    max_sample_rate: int | None = Field(None, ge=1, description="Skip recordings of higher rates.")
    min_channels: int | None = Field(None, ge=1, description="Skip recordings of fewer channels.")
    max_channels: int | None = Field(None, ge=1, description="Skip recordings of more channels.")
    where: str | None = Field(
        None, description="Skip items whose metadata do not fit, such as genre == 'rock'."
    )
    include: tuple[str, ...] = Field(
        (), description="Globs over a folder's paths: take these files only."
    )
    exclude: tuple[str, ...] = Field((), description="Globs over a folder's paths: not these.")
    path_column: str | None = Field(None, description="A manifest's column of paths or URLs.")
    start_column: str | None = Field(None, description="Its column of starts, in seconds.")
    duration_column: str | None = Field(None, description="Its column of durations, in seconds.")
    key_column: str | None = Field(None, description="A table's column of unique names.")
    audio_column: str | None = Field(None, description="A Parquet file's column of audio bytes.")
    group_by: str | None = Field(
        None, description="Regular expression over keys, (?P<group>...), or metadata:FIELD,FIELD."
    )
    retry_failed: bool = Field(False, description="Encode the units anew that hold failed items.")
    unit_seconds: float | None = Field(
        None, gt=0, description="Audio seconds per unit (one shard); default by corpus size."
    )
    shard_size: ByteSize | None = Field(
        None, ge=1, description="Estimated size of a shard at most, such as 512MiB; default 1 GiB."
    )
    extend: bool = Field(
        False, description="Add what is new in the source to the store's plan, as new units."
    )
    retry_changed: bool = Field(
        False, description="With extend: encode the units anew whose files have changed."
    )
    probe: bool | None = Field(
        None,
        description="Read headers for lengths that the source does not give; default for up to "
        "100,000 local files.",
    )
    device: str = Field("auto", description="auto, cpu or cuda.")
    workers: int | None = Field(None, ge=1, description="Models in memory; default one per GPU.")
    threads: int | None = Field(None, ge=1, description="CPU threads of a worker on CPU.")
    decode_threads: int | None = Field(
        None,
        ge=1,
        description="Decoding threads of a worker; default 2, or on a GPU its share of the node's "
        "cores, up to 16.",
    )
    decode_tasks: int = Field(
        0,
        ge=0,
        description="Ray tasks that decode a unit on any node with free CPU cores, instead of the "
        "worker's threads; 0: none.",
    )
    decode_timeout: float = Field(
        600, gt=0, description="Seconds that decoding an item may take, on top of its length."
    )
    batch_size: int | None = Field(None, ge=1, description="Chunks per forward pass.")
    address: str | None = Field(
        None, description="Ray cluster; default RAY_ADDRESS, else an embedded Ray."
    )
    stall_minutes: float = Field(
        15.0, gt=0, description="A worker that makes no progress for so long is replaced."
    )
    log_format: Literal["text", "json"] = Field(
        "text", description="How the run tells how it goes: for people, or an object per line."
    )


def load_config(
    file: str | Path | None, options: Mapping[str, Any], *, trust_model: bool = False
) -> RunConfig:
    """Read a YAML config; options that are not None win over it.

    Args:
        file: The config, if there is one.
        options: Settings that win over it.
        trust_model: Whether a config that lies in a store may name code to run.

    Raises:
        ConfigError: The file cannot be read, or a setting is unknown or invalid.
        ModelError: The file lies in a store, and names a model that is not built in.
    """
    values: dict[str, Any] = {}
    if file is not None:
        try:
            loaded = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
        except OSError as error:
            raise ConfigError(f"Config {file} cannot be read: {error.strerror}.") from error
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            cause = " ".join(str(error).split())
            raise ConfigError(f"Config {file} is not valid YAML: {cause}.") from error
        if not isinstance(loaded, dict):
            raise ConfigError(f"Config {file} must hold `setting: value` lines.")
        values.update(loaded)
    given = {name: value for name, value in options.items() if value is not None}
    written, wanted = values.get("model_options"), given.get("model_options")
    if isinstance(written, dict) and isinstance(wanted, dict):  # one does not drop the others
        given["model_options"] = {**written, **wanted}
    values.update(given)
    try:
        config = RunConfig.model_validate(values)
    except ValidationError as error:
        raise ConfigError(_explain(error.errors()[0], given, file)) from error
    if file is not None and (store := store_of(Path(file))) is not None:
        _check_config_of_store(config, given, Path(file), store, trusted=trust_model)
    if secret := next(filter(is_secret_name, config.model_options), None):
        raise ConfigError(
            f"Model option {secret} would be written into the store, as all options are: let the "
            "model read it from an environment variable."
        )
    for name in RANGES:
        low, high = getattr(config, f"min_{name}"), getattr(config, f"max_{name}")
        if low is not None and high is not None and low > high:
            raise ConfigError(
                f"{option(f'min_{name}')} {low} is above {option(f'max_{name}')} {high}, so every "
                "item would be skipped: change one of them."
            )
    if config.where is not None:
        Condition(config.where)
    if config.group_by is not None:
        check_rule(config.group_by)
    return config


def _check_config_of_store(
    config: RunConfig, given: Mapping[str, Any], file: Path, store: Path, *, trusted: bool
) -> None:
    """Refuse what a config that came with a store may not decide: which code runs, and where.

    A Ray cluster can run code in the processes that attach to it.

    Raises:
        ConfigError: It names a Ray cluster.
        ModelError: It names a model that is not built in.
    """
    if "model" not in given:
        by = f"config {file} in the store {store}"
        check_named(config.model, config.model_options, by=by, trusted=trusted)
    if config.address is not None and "address" not in given and not trusted:
        raise ConfigError(
            f"Config {file} in the store {store} names the Ray cluster {config.address}, which can "
            f"run code here: {CONSENT}, or name the cluster with --address."
        )


def option(setting: str) -> str:
    """The argument or option of the command line that stands for a setting."""
    named = {"source": "SOURCE", "out": "STORE", "model_options": "--model-option"}
    return named.get(setting, f"--{setting.replace('_', '-')}")


def _explain(error: ErrorDetails, given: Mapping[str, Any], file: str | Path | None) -> str:
    """What is wrong with a setting, by the name that the user gave it."""
    setting, *parts = map(str, error["loc"])
    value, message = error["input"], error["msg"].replace("Input should be", "it must be")
    name, where = option(setting), ""
    if error["type"] == "missing":
        return f"{name} is missing: give it as an argument, or set {setting} in a config file."
    if file is not None and setting not in given:
        name, where = setting, f" in {file}"
    if error["type"] in ("extra_forbidden", "invalid_key"):
        close = difflib.get_close_matches(setting, RunConfig.model_fields, n=1)
        hint = f"did you mean {close[0]}?" if close else "`latentmill encode --help` lists them."
        return f"unknown setting {setting}{where}: {hint}"
    if error["type"] == "byte_size":
        message = "expected a size such as 512MiB"
    elif parts and setting == "model_options":
        name, message = f"{name} {parts[0]}", "expected text, a number, true, false or null"
    return f"invalid {name} {value!r}{where}: {message}."


def fingerprint_document(
    config: RunConfig, spec: ModelSpec, chunking: Chunking
) -> dict[str, dict[str, Any]]:
    """Everything that changes the latents, by section, as JSON values.

    The default precision depends on where the workers are: `run` settles it before. Left open, it
    is that of a CPU.
    """
    settings = config.model_dump(mode="json")
    resolved = {"model", "model_options", "channels", "precision"}
    resolved |= {"stitch", "chunk_seconds", "chunk_samples", "overlap"}
    return {
        "model": {
            **spec.identity,
            "name": spec.name,
            "sample_rate": spec.sample_rate,
            "channels": spec.channels,
            "latent_channels": spec.latent_channels,
            "hop": spec.hop,
            "scale_factor": spec.scale_factor,
        },
        "chunking": {
            "stitch": chunking.stitch,
            "samples": chunking.samples,
            "step": chunking.step,
            "overlap": chunking.overlap,
            "skew": chunking.skew,
        },
        "numeric": {"precision": config.precision or "float32"},
        "preprocessing": {"encoding_version": ENCODING_VERSION, "resampler": "soxr HQ"},
        "settings": {
            name: value
            for name, value in settings.items()
            if name not in OPERATIONAL and name not in resolved
        },
    }


def version_difference(stored: Mapping[str, Any]) -> str | None:
    """Why this version of latentmill cannot add to a store of this fingerprint document."""
    version = stored.get("preprocessing", {}).get("encoding_version")
    if version == ENCODING_VERSION:
        return None
    made, action = "an earlier", "encode into a new output folder"
    if isinstance(version, int) and version > ENCODING_VERSION:
        made, action = "a later", "update latentmill or encode into a new output folder"
    return (
        f"was encoded by {made} version of latentmill, whose latents of the same audio can differ "
        f"(encoding version {version}, now {ENCODING_VERSION}): it stays readable, but to add to "
        f"it or resume it, {action}."
    )
