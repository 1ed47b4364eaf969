"""Finding and loading autoencoders of diffusers."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import PurePosixPath
from typing import Any

import torch

from latentmill.errors import ModelError
from latentmill.models.families import stable_audio
from latentmill.models.families.codec import FoundCodec
from latentmill.models.families.stable_audio import OwnFormat
from latentmill.models.weights import (
    LOAD_ERRORS,
    ModelFiles,
    does_not_load,
    find,
    import_package,
    parse_repo,
    read_config,
    read_state,
)

State = dict[str, torch.Tensor]
STEMS = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")


def find_autoencoder(
    name: str,
    class_name: str,
    repo: str,
    revision: str | None,
    subfolder: str | None,
    default: str = "vae",
    own: OwnFormat | None = None,
) -> FoundCodec:
    """Find an autoencoder's files.

    Its `config.json` must have the class name `class_name`; settings that it leaves out have the
    defaults of the class. Without a subfolder the autoencoder is in the folder `default`, if that
    exists, else at the root of the repository. If there is no `config.json` of this class but a
    configuration in the format `own`, it is converted.
    """
    package, version = import_package(name, "diffusers")
    if not hasattr(package, class_name):
        raise ModelError(
            f"Model {name}: diffusers {version} has no {class_name}: run "
            "`pip install -U 'latentmill[diffusers]'`."
        )
    folders = [f"{default}/", ""] if subfolder is None else [f"{subfolder.strip('/')}/".lstrip("/")]
    wanted = {
        "config": [f"{folder}config.json" for folder in folders],
        "weights": [f"{folder}{stem}" for folder in folders for stem in STEMS],
    }
    location = parse_repo(name, repo, revision)
    wanted_own = {
        "config": [f"{folders[-1]}{file}" for file in stable_audio.CONFIGS],
        "weights": [f"{folders[-1]}{file}" for file in stable_audio.WEIGHTS],
    }
    if own is not None:
        wanted = {role: [*files, *wanted_own[role]] for role, files in wanted.items()}
    files = find(name, location, wanted)
    if own is not None and not is_own(files) and not _is_of(class_name, name, files):
        with suppress(ModelError):  # without such files, the error below tells what it found
            files = find(name, location, wanted_own)
    if own is not None and is_own(files):
        return FoundCodec(
            name, files, _own_config(name, class_name, files, own), "diffusers", version
        )
    config = read_config(name, files.paths["config"])
    if not _is_of(class_name, name, files):
        found = config.get("_class_name") or config.get("model_type")
        raise does_not_load(name, files.paths["config"], ValueError(f"it belongs to {found}"))
    signature = inspect.signature(getattr(package, class_name).__init__)
    defaults = {n: p.default for n, p in signature.parameters.items() if p.default is not p.empty}
    return FoundCodec(name, files, {**defaults, **config}, "diffusers", version)


def _is_of(class_name: str, name: str, files: ModelFiles) -> bool:
    return bool(read_config(name, files.paths["config"]).get("_class_name") == class_name)


def load_autoencoder(
    name: str,
    class_name: str,
    files: ModelFiles,
    device: torch.device,
    own: OwnFormat | None = None,
    renamed: Callable[[State], State] = lambda state: state,
) -> Any:
    """Build an autoencoder in float32 from its configuration and its state dict.

    `renamed` gives the tensors of older checkpoints their present names.
    """
    package, _ = import_package(name, "diffusers")
    path = files.paths["weights"]
    if own is not None and is_own(files):
        config = _own_config(name, class_name, files, own)
        state = _own_state(name, files, own, config)
    else:
        config = read_config(name, files.paths["config"])
        state = renamed(read_state(name, path))
    try:
        with warnings.catch_warnings():  # diffusers uses torch's deprecated weight_norm
            warnings.simplefilter("ignore", FutureWarning)
            model = getattr(package, class_name).from_config(config)
        model.load_state_dict(state)
    except LOAD_ERRORS as error:
        raise does_not_load(name, path, error) from error
    return model.float().eval().requires_grad_(False).to(device)


def is_own(files: ModelFiles) -> bool:
    """Whether files are in the format of stable-audio-tools."""
    return PurePosixPath(files.names["config"]).name in stable_audio.CONFIGS


def _own_config(name: str, class_name: str, files: ModelFiles, own: OwnFormat) -> dict[str, Any]:
    path = files.paths["config"]
    config = read_config(name, path)
    try:
        autoencoder, _ = stable_audio.autoencoder_of(config)
        return own.config(autoencoder, config["sample_rate"])
    except stable_audio.UnsupportedCheckpointError as error:
        raise ModelError(
            f"Model {name}: {path} has {error}, which {class_name} of diffusers does not "
            "implement: use another checkpoint."
        ) from error
    except LOAD_ERRORS as error:
        raise does_not_load(name, path, error) from error


def _own_state(
    name: str, files: ModelFiles, own: OwnFormat, config: dict[str, Any]
) -> dict[str, torch.Tensor]:
    """Read the weights of the autoencoder alone: those of a diffusion model are large."""
    path = files.paths["weights"]
    _, prefix = stable_audio.autoencoder_of(read_config(name, files.paths["config"]))
    state = read_state(name, path, stable_audio.ENTRY, prefix=prefix)
    try:
        return own.state(stable_audio.own_weights(state, prefix), config)
    except LOAD_ERRORS as error:
        raise does_not_load(name, path, error) from error
