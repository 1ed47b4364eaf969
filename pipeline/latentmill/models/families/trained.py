"""The model `trained:PATH`: what `latentmill.training` and jobs/train_linear.py wrote.

PATH is the folder of a run or its folder `model`, which contains `trained.json` and the weights in
the format of the architecture's own family, so that `oobleck:PATH` loads them, too. Only the
architectures of `ARCHITECTURES` are built; the file cannot name code to run.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from latentmill.errors import ModelError, requirement
from latentmill.models.base import ModelHandle, Value
from latentmill.models.families.codec import CodecHandle, check_scale_factor
from latentmill.models.families.conv import ConvAutoencoder, ConvSettings, conv_spec
from latentmill.models.hub import Repo
from latentmill.models.weights import (
    LOAD_ERRORS,
    ModelFiles,
    does_not_load,
    find,
    local_files,
    read_state,
)
from latentmill.text.printing import one_line

MANIFEST = "trained.json"
FOLDER = "model"  # in the folder of a run
WEIGHTS = "model.safetensors"  # of conv; the other families have their own names

Architecture = Literal["conv", "oobleck", "dac", "lin-cae"]


class Trained(BaseModel):
    """The contents of `trained.json`.

    Attributes:
        architecture: The family that loads the weights.
        network: The settings of the network, for `conv`.
        run: Name of the run and a hash of its settings. Part of the fingerprint.
        step: The training step of the weights.
        linearity: The settings of the linearity augmentation; None: trained without it.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    version: Literal[1] = 1
    architecture: Architecture
    network: dict[str, Any] = Field(default_factory=dict)
    run: str
    step: int = Field(ge=0)
    linearity: dict[str, Value] | None = None


def build(path: str, *, scale_factor: float | None = None) -> ModelHandle:
    """Find a trained model; `scale_factor` multiplies its latents (default: the family's)."""
    name = f"trained:{path}"
    with local_files(name, path):
        folder = _folder(name, path)
    found = find(name, Repo(str(folder)), {"config": [MANIFEST]})
    trained = read_manifest(name, found.paths["config"])
    handle: Any = _FAMILIES[trained.architecture](name, folder, trained, scale_factor)
    identity = {**handle.spec.identity, "run": trained.run}
    if trained.architecture != "conv":  # whose own files do not include trained.json
        identity["sha256_trained"] = found.sha256["config"]
    resolved: ModelHandle = replace(handle, spec=replace(handle.spec, identity=identity))
    return resolved


def read_manifest(name: str, path: Path) -> Trained:
    """Read `trained.json`; raise `ModelError` if it is not valid or has another architecture."""
    try:
        return Trained.model_validate_json(path.read_text(encoding="utf-8"))
    except ValueError as error:
        known = ", ".join(get_args(Architecture))
        why = _reason(error) if isinstance(error, ValidationError) else one_line(error)
        raise ModelError(
            f"Model {name}: {path} is not valid ({why}); known architectures are {known}."
        ) from error


def _reason(error: ValidationError) -> str:
    """The first error, in plain words."""
    first = error.errors()[0]
    where = ".".join(map(str, first["loc"])) or "the file"
    return f"{where}: {requirement(first['type'], first['msg'])}"


def _folder(name: str, path: str) -> Path:
    """The folder with `trained.json`."""
    given = Path(os.path.abspath(Path(path).expanduser()))  # noqa: PTH100  links stay
    inside = given.parent if given.is_file() else given
    for folder in (inside,) if given.is_file() else (given, given / FOLDER):
        if (folder / MANIFEST).is_file():
            return folder
    for run in (inside, inside.parent):
        if given.exists() and (run / FOLDER / MANIFEST).is_file():
            raise ModelError(
                f"Model {name}: {given} is not a model; use trained:{run}, which loads the "
                f"averaged weights in {FOLDER}."
            )
    what = f"has no {MANIFEST}" if given.exists() else "does not exist"
    raise ModelError(
        f"Model {name}: {given} {what}; give the folder of a run of jobs/train_linear.py, which "
        f"writes {FOLDER}/{MANIFEST} with its checkpoints."
    )


def _conv(name: str, folder: Path, trained: Trained, scale_factor: float | None) -> CodecHandle:
    files = find(name, Repo(str(folder)), {"config": [MANIFEST], "weights": [WEIGHTS]})
    scale = check_scale_factor(name, 1.0 if scale_factor is None else scale_factor)
    try:
        settings = ConvSettings.model_validate(trained.network)
    except ValidationError as error:
        invalid = ValueError(f"network: {_reason(error)}")
        raise does_not_load(name, files.paths["config"], invalid) from error
    spec = replace(
        conv_spec(settings),
        scale_factor=scale,
        identity={"architecture": "conv", "version": 1, **files.identity},
        provenance=files.provenance,
    )
    return CodecHandle(spec, files, load_conv)


def load_conv(
    name: str, files: ModelFiles, device: torch.device, **options: Value
) -> ConvAutoencoder:
    """Build the network from its files; see `NetworkLoader`."""
    del options
    name = f"trained:{files.paths['config'].parent}"  # that of the spec is conv
    trained = read_manifest(name, files.paths["config"])
    state = read_state(name, files.paths["weights"])
    try:
        network = ConvAutoencoder(ConvSettings.model_validate(trained.network))
        network.load_state_dict(state)
    except LOAD_ERRORS as error:
        raise does_not_load(name, files.paths["weights"], error) from error
    return network.eval().requires_grad_(False).to(device)


def _oobleck(name: str, folder: Path, trained: Trained, scale_factor: float | None) -> ModelHandle:
    from latentmill.models.families import oobleck

    return oobleck.build(str(folder), scale_factor=1.0 if scale_factor is None else scale_factor)


def _dac(name: str, folder: Path, trained: Trained, scale_factor: float | None) -> ModelHandle:
    from latentmill.models.families import dac

    return dac.build(str(folder), scale_factor=1.0 if scale_factor is None else scale_factor)


def _linear_cae(
    name: str, folder: Path, trained: Trained, scale_factor: float | None
) -> ModelHandle:
    from latentmill.models.families.linear_cae import model

    return model.build("lin-cae", repo=str(folder), scale_factor=scale_factor)


_FAMILIES: dict[str, Callable[[str, Path, Trained, float | None], ModelHandle]] = {
    "conv": _conv,
    "oobleck": _oobleck,
    "dac": _dac,
    "lin-cae": _linear_cae,
}
