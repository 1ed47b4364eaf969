"""The package linear-cae and the files of its models."""

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
WITHDRAWN = ("0.1.2", "0.1.3")  # these releases scale latents wrongly


@dataclass(frozen=True)
class LinearCaePackage:
    """The parts of the installed package that are used here."""

    version: str
    repo: str
    folders: Mapping[str, str]  # hash in the folder's name, by model name
    scale_factors: Mapping[str, float]  # by model name
    Autoencoder: Any
    classes: Mapping[str, Callable[..., Any]]  # by role of the file that has their arguments


@dataclass(frozen=True)
class LinearCaeArguments:
    """The arguments of a model's three parts, including the package's defaults."""

    frontend: Mapping[str, Any]
    generator: Mapping[str, Any]
    diffusion: Mapping[str, Any]


def import_linear_cae(name: str) -> LinearCaePackage:
    """Import the package; raise `ModelError` if it is missing or a withdrawn release."""
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
    """Find a model's four files: in its folder of the repository, or directly in a local folder."""
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
    """Read the arguments of the model's parts; `ModelError` if the package does not accept them."""
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
