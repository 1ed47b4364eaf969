"""The settings of a run, each declared once, and the fingerprint that is computed from them.

A field of `RunConfig` declares name, type, default, bounds, help text, group, whether the setting
changes the latents, and the sources to which it applies. The options of `encode` and `plan`, the
JSON schema, `EncodeOptions`, the fingerprint and the errors for settings without effect are derived
from it.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import ByteSize, Field, ValidationError
from pydantic_core import ErrorDetails

from latentmill.encoding.chunks import Chunking
from latentmill.encoding.fingerprint import ENCODING_VERSION
from latentmill.errors import ConfigError, requirement
from latentmill.models.base import Channels, ModelSpec, Stitch
from latentmill.models.inference.precision import Precision
from latentmill.models.trust import CONSENT, check_named, store_of
from latentmill.record import ShardFormat
from latentmill.sources.filters import RANGES
from latentmill.sources.group import check_rule
from latentmill.sources.settings import Effect, Setting, SourceSettings, choices, option
from latentmill.sources.where import Condition
from latentmill.storage.yaml_file import read_yaml
from latentmill.text.redact import is_secret_name

DEFAULT_CPU_THREADS = 4  # cores of a worker if `threads` is not set

# Settings that are in every fingerprint. A setting that is added later is in a fingerprint only if
# it is not at its default, so that older stores can still be resumed.
_ALWAYS_IN_FINGERPRINT = frozenset(
    {"dtype", "compile", "allow_truncated", "min_seconds", "max_seconds", "min_rms"}
    | {"min_sample_rate", "max_sample_rate", "min_channels", "max_channels", "where"}
)

_OUTPUT = Setting()
_MODEL = Setting("Model", "model")
_NUMBERS = Setting("Model", "latents")
_LOADING = Setting("Source", "latents")
_FILTER = Setting("Filters", "latents")
_PLAN = Setting("Plan")
_FIELDS = Setting("Fields")
_COMPUTE = Setting("Compute")


class RunConfig(SourceSettings):
    """The settings of a run: options of `latentmill encode`, or YAML with `--config FILE`."""

    out: Annotated[str, _OUTPUT] = Field(description="Store to write or resume: a folder or URL.")
    format: Annotated[ShardFormat, _OUTPUT] = Field(
        "parquet", description=f"Shard format: {choices(ShardFormat)}."
    )
    log_format: Annotated[Literal["text", "json"], _OUTPUT] = Field(
        "text", description="Progress on stderr: text, or json with one object per line."
    )
    model: Annotated[str, _MODEL] = Field(
        "mdct", description="Autoencoder; `latentmill models` lists them."
    )
    model_options: Annotated[dict[str, str | int | float | bool | None], _MODEL] = Field(
        default_factory=dict,
        description="Option of the model as NAME=VALUE, e.g. scale_factor=20. Repeatable.",
    )
    channels: Annotated[Channels | None, _MODEL] = Field(
        None,
        description="mono: average the channels. split: run a mono model on each stereo channel. "
        "[default: the model's]",
    )
    precision: Annotated[Precision | None, _MODEL] = Field(
        None,
        description="Arithmetic of the model: float32, tf32, bf16 or fp16. "
        "[default: tf32 on a GPU, float32 on a CPU]",
    )
    dtype: Annotated[Literal["float16", "float32"], _NUMBERS] = Field(
        "float16", description="Number format of stored latents: float16 or float32."
    )
    compile: Annotated[bool, _NUMBERS] = Field(
        False,
        description="Encode full batches with torch.compile, on a GPU also with CUDA graphs.",
    )
    stitch: Annotated[Stitch | None, _MODEL] = Field(
        None,
        description="How to join the chunks of an item: trim, crossfade, none (keep them) or state "
        "(for causal models: each chunk continues from the model's state after the previous one). "
        "[default: the model's]",
    )
    chunk_seconds: Annotated[float | None, _MODEL] = Field(
        None, gt=0, description="Chunk length in seconds. [default: the model's]"
    )
    chunk_samples: Annotated[int | None, _MODEL] = Field(
        None, ge=1, description="Chunk length in samples, instead of --chunk-seconds."
    )
    overlap: Annotated[float | None, _MODEL] = Field(
        None,
        ge=0,
        le=0.5,
        description="Fraction of a chunk that the next one repeats, 0 to 0.5. "
        "[default: the model's]",
    )
    allow_truncated: Annotated[bool, _LOADING] = Field(
        False,
        description="Encode the readable part of truncated files instead of failing them.",
    )
    min_seconds: Annotated[float | None, _FILTER] = Field(
        None, ge=0, description="Skip items shorter than this many seconds."
    )
    max_seconds: Annotated[float | None, _FILTER] = Field(
        None, gt=0, description="Skip items longer than this many seconds."
    )
    min_rms: Annotated[float | None, _FILTER] = Field(
        None, le=0, description="Skip items with an RMS level below this, in dBFS, e.g. -60."
    )
    min_sample_rate: Annotated[int | None, _FILTER] = Field(
        None, ge=1, description="Skip items with a sample rate below this, in Hz."
    )
    max_sample_rate: Annotated[int | None, _FILTER] = Field(
        None, ge=1, description="Skip items with a sample rate above this, in Hz."
    )
    min_channels: Annotated[int | None, _FILTER] = Field(
        None, ge=1, description="Skip items with fewer channels than this."
    )
    max_channels: Annotated[int | None, _FILTER] = Field(
        None, ge=1, description="Skip items with more channels than this."
    )
    where: Annotated[str | None, _FILTER] = Field(
        None,
        description="Skip items whose metadata do not match, e.g. \"genre == 'rock' and bpm > "
        '100".',
    )
    unit_seconds: Annotated[float | None, _PLAN] = Field(
        None,
        gt=0,
        description="Maximum seconds of audio per shard; a group is never divided. [default: a "
        "256th of the corpus, 1 minute to 4 hours]",
    )
    shard_size: Annotated[ByteSize | None, _PLAN] = Field(
        None, ge=1, description="Maximum shard size (estimated), e.g. 512MiB. [default: 1GiB]"
    )
    probe: Annotated[bool | None, _PLAN] = Field(
        None,
        description="Read the headers of files for their lengths, to plan and estimate exactly. "
        "[default: of local files, if at most 100,000 lengths are unknown]",
    )
    retry_failed: Annotated[bool, _PLAN] = Field(
        False, description="Retry failed items: encode their shards again."
    )
    extend: Annotated[bool, _PLAN] = Field(
        False, description="Add files that are new in SOURCE to the store."
    )
    retry_changed: Annotated[bool, _PLAN] = Field(
        False, description="With --extend: encode changed files again."
    )
    refresh_metadata: Annotated[bool, _PLAN] = Field(
        False,
        description="With --extend: update changed captions and other metadata, without encoding "
        "again. Values that `annotate` has set stay.",
    )
    with_fields: Annotated[dict[str, str | dict[str, Any]], _FIELDS] = Field(
        default_factory=dict,
        description="Field to compute in the same pass: NAME=MODEL from audio, "
        "NAME=MODEL@metadata.KEY from a text, or NAME=MODEL@latents. Repeatable.",
    )
    device: Annotated[str, _COMPUTE] = Field(
        "auto", description="Device of the model: auto, cpu or cuda."
    )
    workers: Annotated[int | None, _COMPUTE] = Field(
        None,
        ge=1,
        description="Number of workers; each loads one copy of the model. "
        "[default: one per GPU, or per 4 CPU cores]",
    )
    threads: Annotated[int | None, _COMPUTE] = Field(
        None,
        ge=1,
        description="CPU cores per worker if there is no GPU. "
        f"[default: up to {DEFAULT_CPU_THREADS}]",
    )
    batch_size: Annotated[int | None, _COMPUTE] = Field(
        None,
        ge=1,
        description="Chunks per forward pass. [default: found by trial on a GPU, else the model's]",
    )
    load_threads: Annotated[int | None, _COMPUTE] = Field(
        None,
        ge=1,
        description="Audio loading threads per worker. "
        "[default: 2; with a GPU, the worker's share of the node's cores, 2 to 16]",
    )
    load_tasks: Annotated[int, _COMPUTE] = Field(
        0,
        ge=0,
        description="Load audio in this many Ray tasks per shard, on any node, instead of threads.",
    )
    load_timeout: Annotated[float, _COMPUTE] = Field(
        600,
        gt=0,
        description="Time limit for loading an item, in seconds, on top of its length.",
    )
    address: Annotated[str | None, _COMPUTE] = Field(
        None, description="Address of a Ray cluster. [default: RAY_ADDRESS, else embedded Ray]"
    )
    stall_minutes: Annotated[float, _COMPUTE] = Field(
        15.0, gt=0, description="Replace a worker after this many minutes without progress."
    )

    def cpu_threads(self, cores: int) -> int:
        """CPU cores of a worker without a GPU, on a machine with this many."""
        return self.threads or max(1, min(DEFAULT_CPU_THREADS, cores))


def setting(name: str) -> Setting:
    """The declaration of a setting, without its type, default, bounds and help text."""
    return Setting.of(RunConfig.model_fields[name])


def settings_of(effect: Effect) -> tuple[str, ...]:
    """Names of the settings with an effect, in the order of their declaration."""
    return tuple(name for name in RunConfig.model_fields if setting(name).effect == effect)


# The settings that a field of a store has of its own. Other ones are those of the store: its items
# and their filters, how audio is loaded, the format of the shards.
FIELD_SETTINGS = tuple(
    name
    for name in RunConfig.model_fields
    if setting(name).group in ("Model", "Compute") or name in ("log_format", "retry_failed")
)


def item_settings(config: SourceSettings) -> dict[str, Any]:
    """The settings that select a source's items and are not at their default, as JSON values.

    `extensions` is not included, because a plan stores it separately.
    """
    names = set(settings_of("items")) - {"extensions"}
    values = config.model_dump(mode="json", include=names)
    return {name: value for name, value in values.items() if value not in (None, [])}


def load_config(
    file: str | Path | None, options: Mapping[str, Any], *, trust_model: bool = False
) -> RunConfig:
    """Read a YAML config file; options that are not None override its settings.

    Args:
        file: The config file, if there is one.
        options: Settings that override those in the file.
        trust_model: Whether a config file inside a store may name code to run.

    Raises:
        ConfigError: The file cannot be read, or a setting is unknown or invalid.
        ModelError: The file is inside a store and names a model that is not built in.
    """
    values = {} if file is None else read_yaml(file)
    given = {name: value for name, value in options.items() if value is not None}
    for name in ("model_options", "with_fields"):
        written, wanted = values.get(name), given.get(name)
        if isinstance(written, dict) and isinstance(wanted, dict):  # merge, option by option
            given[name] = {**written, **wanted}
    chosen = frozenset(options.get("with_fields") or ())  # fields that the file does not choose
    values.update(given)
    try:
        config = RunConfig.model_validate(values)
    except ValidationError as error:
        raise ConfigError(_explain(error.errors()[0], given, file)) from error
    if file is not None and (store := store_of(Path(file))) is not None:
        _check_config_of_store(config, given, chosen, Path(file), store, trusted=trust_model)
    if secret := next(filter(is_secret_name, config.model_options), None):
        raise ConfigError(
            f"Model option {secret} looks like a secret, and all model options are written into "
            "the store: let the model read it from an environment variable."
        )
    for name in RANGES:
        low, high = getattr(config, f"min_{name}"), getattr(config, f"max_{name}")
        if low is not None and high is not None and low > high:
            raise ConfigError(
                f"{option(f'min_{name}')} {low} is above {option(f'max_{name}')} {high}, so every "
                "item would be skipped: change one of them."
            )
    if config.where is not None:
        Condition(config.where, option("where") if "where" in given else "where")
    if config.group_by is not None:
        check_rule(config.group_by)
    return config


def _check_config_of_store(
    config: RunConfig,
    given: Mapping[str, Any],
    chosen: Collection[str],
    file: Path,
    store: Path,
    *,
    trusted: bool,
) -> None:
    """Raise an error if a config file inside a store chooses which code runs, or where.

    That is a model that is not built in, or a Ray cluster, which can run code in its processes.
    """
    by = f"config {file} in the store {store}"
    if "model" not in given:
        check_named(config.model, config.model_options, by=by, trusted=trusted)
    for name, value in config.with_fields.items():
        if name not in chosen:
            field = {"model": value} if isinstance(value, str) else value
            options: Any = field.get("model_options")
            options = options if isinstance(options, dict) else {}  # a run refuses other values
            check_named(str(field.get("model")), options, by=by, trusted=trusted)
    if config.address is not None and "address" not in given and not trusted:
        raise ConfigError(
            f"Config {file} in the store {store} names the Ray cluster {config.address}, which can "
            f"run code on this machine: {CONSENT}, or give the cluster with --address."
        )


def _explain(error: ErrorDetails, given: Mapping[str, Any], file: str | Path | None) -> str:
    """The error message for an invalid setting, named as the user gave it."""
    setting, *parts = map(str, error["loc"])
    value, message = error["input"], requirement(error["type"], error["msg"])
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
    elif parts and setting == "with_fields":
        name, message = f"{name} {parts[0]}", "expected a model, or settings of the field"
    elif parts and setting == "model_options":
        name, message = f"{name} {parts[0]}", "expected text, a number, true, false or null"
    return f"invalid {name} {value!r}{where}: {message}."


def fingerprint_document(
    config: RunConfig, spec: ModelSpec, chunking: Chunking
) -> dict[str, dict[str, Any]]:
    """Everything that changes the latents, by section, as JSON values.

    The default precision depends on the workers' device, so `run` sets it before. If it is not set,
    it is that of a CPU.
    """
    settings = config.model_dump(mode="json", include=set(settings_of("latents")))
    # Earlier versions padded the last of several windows in a chunk with zeros.
    of_windows = chunking.stitch in ("trim", "crossfade") and spec.hop < chunking.samples
    last = {"last_chunk": "short"} if of_windows and chunking.ends_short(spec) else {}
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
        "preprocessing": {"encoding_version": ENCODING_VERSION, "resampler": "soxr HQ", **last},
        "settings": {
            name: value
            for name, value in settings.items()
            if name in _ALWAYS_IN_FINGERPRINT or value != RunConfig.model_fields[name].default
        },
    }
