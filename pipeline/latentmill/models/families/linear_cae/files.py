"""The package linear-cae and the files of its models."""

from __future__ import annotations

import inspect
import sys
from types import ModuleType
from typing import Any

import yaml

from latentmill.errors import ModelError
from latentmill.models.hub import Repo
from latentmill.models.weights import WEIGHTS, ModelFiles, find, import_package
from latentmill.text.printing import one_line

ROLES = {
    WEIGHTS: "autoencoder_inference_model_last.pth",
    "frontend": "frontend_kwargs_last.yaml",
    "generator": "generator_kwargs_last.yaml",
    "diffusion": "diffusion_kwargs_last.yaml",
}
WITHDRAWN = ("0.1.2", "0.1.3")  # these releases scale latents wrongly


def import_linear_cae(name: str) -> tuple[ModuleType, str]:
    """Import the package's module `inference`; return it and the package's version.

    Raises `ModelError` if the package is missing or a withdrawn release.
    """
    install = "pip install 'latentmill[linear-cae]'"
    if sys.version_info >= (3, 13):  # it pins numpy < 2, which has no wheels for these versions
        install = "pip install --no-deps linear-cae==0.1.4"
    inference, installed = import_package(
        name, "linear-cae", module="linear_cae.inference", install=install
    )
    if installed in WITHDRAWN:
        raise ModelError(
            f"Model {name}: linear-cae {installed} was withdrawn because of wrong latent scales: "
            f"run `{install}`."
        )
    return inference, installed


def find_linear_cae(name: str, inference: ModuleType, repo: Repo) -> ModelFiles:
    """Find a model's four files: in its folder of the repository, or directly in a local folder."""
    folder = f"{inference.id_to_hash[name]}_weights"
    return find(
        name,
        repo,
        {
            role: [f"{folder}/{file}", *([file] if repo.local else [])]
            for role, file in ROLES.items()
        },
    )


def read_arguments(
    name: str, inference: ModuleType, files: ModelFiles
) -> dict[str, dict[str, Any]]:
    """Read the arguments of the model's parts, with the package's defaults, in the model's order.

    Raises `ModelError` if the package does not accept them.
    """
    parts = {
        "frontend": inference.ScaledComplexSTFT,
        "generator": inference.UNet,
        "diffusion": inference.Diffusion,
    }
    arguments: dict[str, dict[str, Any]] = {}
    for role, part in parts.items():
        path = files.paths[role]
        try:
            given = yaml.safe_load(path.read_text(encoding="utf-8"))
            bound = inspect.signature(part).bind(**given)
        except (yaml.YAMLError, UnicodeDecodeError, TypeError) as error:
            raise ModelError(
                f"Model {name}: {path} does not fit the installed linear-cae "
                f"({one_line(error)}); delete it and download it again."
            ) from error
        bound.apply_defaults()
        arguments[role] = dict(bound.arguments)
    return arguments
