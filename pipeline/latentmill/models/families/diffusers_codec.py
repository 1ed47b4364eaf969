"""Finding and loading autoencoders of diffusers."""

from __future__ import annotations

import inspect
import warnings
from typing import Any

import torch

from latentmill.errors import ModelError
from latentmill.models.families.codec import FoundCodec
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

STEMS = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")


def find_autoencoder(
    name: str,
    class_name: str,
    repo: str,
    revision: str | None,
    subfolder: str | None,
    default: str = "vae",
) -> FoundCodec:
    """Find an autoencoder's files.

    Its `config.json` must have the class name `class_name`; settings that it leaves out have the
    defaults of the class. Without a subfolder the autoencoder is in the folder `default`, if that
    exists, else at the root of the repository.
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
    files = find(name, parse_repo(name, repo, revision), wanted)
    config = read_config(name, files.paths["config"])
    if config.get("_class_name") != class_name:
        found = config.get("_class_name") or config.get("model_type")
        raise does_not_load(name, files.paths["config"], ValueError(f"it belongs to {found}"))
    signature = inspect.signature(getattr(package, class_name).__init__)
    defaults = {n: p.default for n, p in signature.parameters.items() if p.default is not p.empty}
    return FoundCodec(name, files, {**defaults, **config}, "diffusers", version)


def load_autoencoder(name: str, class_name: str, files: ModelFiles, device: torch.device) -> Any:
    """Build an autoencoder in float32 from its configuration and its state dict."""
    package, _ = import_package(name, "diffusers")
    state = read_state(name, files.paths["weights"])
    config = read_config(name, files.paths["config"])
    try:
        with warnings.catch_warnings():  # diffusers uses torch's deprecated weight_norm
            warnings.simplefilter("ignore", FutureWarning)
            model = getattr(package, class_name).from_config(config)
        model.load_state_dict(state)
    except LOAD_ERRORS as error:
        raise does_not_load(name, files.paths["weights"], error) from error
    return model.float().eval().requires_grad_(False).to(device)
