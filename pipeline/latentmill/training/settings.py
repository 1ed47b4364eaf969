"""The settings of a training run: jobs/train_linear.py and its YAML file."""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, Field, ValidationError

from latentmill.errors import ConfigError, requirement
from latentmill.models.families.conv import ConvSettings
from latentmill.sources.settings import Setting, SourceSettings
from latentmill.storage.job_folder import refuse_job_folder
from latentmill.storage.yaml_file import read_yaml
from latentmill.training.linearity import LinearitySettings

_RUN = Setting()
# What does not change the trained weights.
_FREE = frozenset(
    {"out", "checkpoint_every", "keep_checkpoints", "log_every", "tensorboard", "load_threads"}
    | {"device", "address", "max_failures"}
)
_GROUPS: dict[str, type[BaseModel]] = {"linearity": LinearitySettings, "network": ConvSettings}


class TrainSettings(SourceSettings):
    """What is trained, on which audio, and how; the settings of a source are those of `encode`."""

    out: Annotated[str, _RUN] = Field(
        description="Folder of the run, on a file system that every node shares."
    )
    model: Annotated[str, _RUN] = Field(
        "conv", description="What to train: conv, oobleck:REPO, dac:REPO, lin-cae or lin-cae:PATH."
    )
    from_scratch: Annotated[bool, _RUN] = Field(
        False, description="Start from random weights instead of those of the model."
    )
    network: Annotated[ConvSettings, _RUN] = Field(
        ConvSettings(), description="The shape of conv; other models have their own."
    )
    linearity: Annotated[LinearitySettings | None, _RUN] = Field(
        LinearitySettings(), description="The augmentation; null trains without it."
    )
    steps: Annotated[int, _RUN] = Field(100_000, ge=1, description="Number of training steps.")
    batch_size: Annotated[int, _RUN] = Field(
        16, ge=1, description="Crops per step and process, without mixtures."
    )
    crop_seconds: Annotated[float, _RUN] = Field(
        0.75,
        gt=0,
        le=600,
        description="Length of a crop in seconds, rounded up to what the model accepts.",
    )
    quieter_db: Annotated[float, _RUN] = Field(
        0.0,
        ge=0,
        description="Crops are made quieter by up to this many dB, drawn uniformly, with and "
        "without linearity, so that the encoder sees each sound at many levels.",
    )
    learning_rate: Annotated[float, _RUN] = Field(
        1e-4, gt=0, description="Learning rate after the warm-up."
    )
    final_learning_rate: Annotated[float, _RUN] = Field(
        1e-6, ge=0, description="Learning rate at the last step; it falls along half a cosine."
    )
    warmup_steps: Annotated[int, _RUN] = Field(
        0, ge=0, description="Steps in which the learning rate rises from 0."
    )
    clip_norm: Annotated[float, _RUN] = Field(
        1.0, gt=0, description="Gradients are scaled down to at most this norm."
    )
    kl_weight: Annotated[float, _RUN] = Field(
        1e-4,
        ge=0,
        description="conv, oobleck: weight of the KL divergence of the posterior in the loss.",
    )
    ema: Annotated[float, _RUN] = Field(
        0.9999, ge=0, lt=1, description="Decay of the moving average of the weights."
    )
    precision: Annotated[Literal["float32", "bf16"], _RUN] = Field(
        "float32", description="float32, or bf16 for mixed precision."
    )
    seed: Annotated[int, _RUN] = Field(
        0, ge=0, le=2**63 - 1, description="Seed of weights, crops and augmentation."
    )
    checkpoint_every: Annotated[int, _RUN] = Field(
        1000, ge=1, description="Steps between checkpoints."
    )
    keep_checkpoints: Annotated[int, _RUN] = Field(
        2, ge=1, description="Number of checkpoints that are kept."
    )
    log_every: Annotated[int, _RUN] = Field(10, ge=1, description="Steps between metrics.")
    tensorboard: Annotated[bool, _RUN] = Field(
        False, description="Also write the metrics for TensorBoard."
    )
    load_threads: Annotated[int, _RUN] = Field(
        2, ge=1, description="Audio loading threads per process."
    )
    workers: Annotated[int, _RUN] = Field(1, ge=1, description="Number of processes.")
    device: Annotated[Literal["auto", "cpu", "cuda"], _RUN] = Field(
        "auto", description="auto, cpu or cuda; with cuda each process has one GPU."
    )
    max_failures: Annotated[int, _RUN] = Field(
        0,
        ge=-1,
        description="How often Ray restarts the run after an error of any kind; -1: always.",
    )
    address: Annotated[str | None, _RUN] = Field(
        None, description="Address of a Ray cluster. [default: RAY_ADDRESS, else embedded Ray]"
    )

    def decisive(self) -> dict[str, Any]:
        """The settings that change the weights, as JSON values."""
        return self.model_dump(mode="json", exclude=set(_FREE))

    @property
    def run(self) -> str:
        """Name of the run: its folder, and a hash of the settings that change the weights."""
        text = json.dumps(self.decisive(), sort_keys=True)
        return f"{Path(self.out).name}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"


def load_settings(file: str | Path | None, options: Mapping[str, Any]) -> TrainSettings:
    """Read a YAML file; options override it. Raises ConfigError with one sentence."""
    values = {} if file is None else read_yaml(file)
    try:
        settings = TrainSettings.model_validate(merged(values, options))
    except ValidationError as error:
        raise ConfigError(_explain(error)) from error
    if "://" in settings.out:
        raise ConfigError(
            f"out {settings.out!r} is a URL: use a folder on a file system that all nodes share."
        )
    if settings.linearity and settings.linearity.mixing != "none" and settings.batch_size < 2:
        raise ConfigError(
            "mixtures need at least 2 sounds per batch: raise batch_size, or set mixing to none."
        )
    refuse_job_folder("out", settings.out)
    family, _, repo = settings.model.partition(":")
    model = f"{family}:{absolute(repo)}" if repo.startswith((".", "~")) else settings.model
    paths = {"out": absolute(settings.out), "source": absolute(settings.source), "model": model}
    return settings.model_copy(update=paths)


def absolute(path: str) -> str:
    """A local path from the root; Ray Train gives its processes another working directory."""
    if "://" in path:
        return path
    return str(Path(path).expanduser().absolute()) + "/" * path.endswith("/")


def _explain(error: ValidationError) -> str:
    """One sentence for the first error."""
    first = error.errors()[0]
    name = ".".join(map(str, first["loc"]))
    if first["type"] == "missing":
        return f"setting {name} is missing: set it in the config file or as an option."
    if first["type"] in ("extra_forbidden", "invalid_key"):
        *group, last = map(str, first["loc"])
        fields = _GROUPS[group[0]].model_fields if group else TrainSettings.model_fields
        close = difflib.get_close_matches(last, fields, n=1)
        near = ".".join([*group, *close])
        hint = f"did you mean {near}?" if close else "jobs/train_linear.yaml lists them."
        return f"unknown setting {name}: {hint}"
    return f"invalid {name} {first['input']!r}: {requirement(first['type'], first['msg'])}."


def parse_options(given: Sequence[str]) -> dict[str, Any]:
    """Settings from NAME=VALUE arguments; values are YAML, and a dot enters a group of settings."""
    options: dict[str, Any] = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not (name and equals):
            raise ConfigError(f"invalid setting {text!r}: expected NAME=VALUE.")
        *groups, last = name.split(".")
        target = options
        for group in groups:
            target = target.setdefault(group, {})
            if not isinstance(target, dict):
                raise ConfigError(
                    f"{text} contradicts {group}={target!r} before it: remove one of them."
                )
        try:
            target[last] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise ConfigError(f"invalid value of {name}: {value!r} is not valid YAML.") from error
    return options


def merged(values: dict[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """Values with options on top, also inside groups of settings."""
    result = dict(values)
    for name, value in options.items():
        before = result.get(name)
        if isinstance(before, dict) and isinstance(value, dict):
            value = merged(before, value)  # noqa: PLW2901
        result[name] = value
    return result
