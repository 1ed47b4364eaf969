"""The package linear-cae and what its models' files say: which there are, what is in them."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import yaml

from latentmill.errors import ModelError
from latentmill.models.weights import WEIGHTS, ModelFiles, Repo, find, import_package, one_line

ROLES = {
    WEIGHTS: "autoencoder_inference_model_last.pth",
    "frontend": "frontend_kwargs_last.yaml",
    "generator": "generator_kwargs_last.yaml",
    "diffusion": "diffusion_kwargs_last.yaml",
}
WITHDRAWN = ("0.1.2", "0.1.3")  # their latents are scaled wrongly


@dataclass(frozen=True)
class LinearCaePackage:
    """What is used of the installed package."""

    version: str
    repo: str
    folders: Mapping[str, str]  # by model name: its folder's hash
    scale_factors: Mapping[str, float]  # by model name
    Autoencoder: Any
    classes: Mapping[str, Callable[..., Any]]  # by the role of the file with their arguments


@dataclass(frozen=True)
class LinearCaeArguments:
    """The arguments of a model's three parts, the package's defaults filled in."""

    frontend: Mapping[str, Any]
    generator: Mapping[str, Any]
    diffusion: Mapping[str, Any]


def import_linear_cae(name: str) -> LinearCaePackage:
    """Import the package.

    Raises:
        ModelError: It is not installed, does not import, or is a withdrawn release.
    """
    install = "pip install 'latentmill[linear-cae]'"
    if sys.version_info >= (3, 13):  # it pins numpy < 2, which has no wheels there
        install = "pip install --no-deps linear-cae==0.1.4"
    inference, installed = import_package(
        name, "linear-cae", module="linear_cae.inference", install=install
    )
    if installed in WITHDRAWN:
        raise ModelError(
            f"Model {name}: linear-cae {installed} was withdrawn for its wrong latent scales: "
            f"run `{install}`."
        )
    return LinearCaePackage(
        version=installed,
        repo=inference.HF_REPO,
        folders=inference.id_to_hash,
        scale_factors=inference.id_to_scale_factor,
        Autoencoder=inference.Autoencoder,
        classes={
            "frontend": inference.ScaledComplexSTFT,
            "generator": inference.UNet,
            "diffusion": inference.Diffusion,
        },
    )


def find_linear_cae(name: str, package: LinearCaePackage, repo: Repo) -> ModelFiles:
    """Find a model's four files: in its folder of the repository, or right in a local folder.

    Raises:
        ModelError: They cannot be had.
    """
    folder = f"{package.folders[name]}_weights"
    return find(
        name,
        repo,
        {
            role: [f"{folder}/{file}", *([file] if repo.local else [])]
            for role, file in ROLES.items()
        },
    )


def read_arguments(name: str, package: LinearCaePackage, files: ModelFiles) -> LinearCaeArguments:
    """Read the arguments of the model's parts.

    Raises:
        ModelError: They do not fit the installed package.
    """
    read: dict[str, Mapping[str, Any]] = {}
    for role, cls in package.classes.items():
        path = files.paths[role]
        try:
            given = yaml.safe_load(path.read_text(encoding="utf-8"))
            bound = inspect.signature(cls).bind(**given)
        except (yaml.YAMLError, UnicodeDecodeError, TypeError) as error:
            raise ModelError(
                f"Model {name}: {path} does not fit the installed linear-cae "
                f"({one_line(error)}); delete it and download it again."
            ) from error
        bound.apply_defaults()
        read[role] = bound.arguments
    return LinearCaeArguments(**read)
