"""The package linear-cae and its models' files: where they are, what they are, what is missing."""

from __future__ import annotations

import hashlib
import importlib
import inspect
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from pickle import UnpicklingError  # what torch.load raises; nothing is unpickled here
from typing import Any

import yaml

from latentmill.errors import ModelError

ROLES = {
    "weights": "autoencoder_inference_model_last.pth",
    "frontend": "frontend_kwargs_last.yaml",
    "generator": "generator_kwargs_last.yaml",
    "diffusion": "diffusion_kwargs_last.yaml",
}
LOAD_ERRORS = (RuntimeError, UnpicklingError, EOFError, OSError, KeyError, TypeError, ValueError)
WITHDRAWN = ("0.1.2", "0.1.3")  # their latents are scaled wrongly
# torch.load reads pickles without restrictions where the user's environment says so.
UNSAFE_LOAD_VARIABLE = "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"


@dataclass(frozen=True)
class LinearCaePackage:
    """What is used of the installed package."""

    version: str
    repo: str
    folders: Mapping[str, str]  # by model name: its folder's hash
    scale_factors: Mapping[str, float]  # by model name
    Autoencoder: Any
    frontend_class: Callable[..., Any]
    generator_class: Callable[..., Any]


@dataclass(frozen=True)
class ModelFiles:
    """The four files of one model on this machine.

    Attributes:
        repo: The hub repository.
        revision: Its commit.
        paths: By role, see `ROLES`.
        sha256: By role.
        frontend: The front end's arguments, the package's defaults filled in.
        generator: The generator's.
    """

    repo: str
    revision: str
    paths: Mapping[str, Path]
    sha256: Mapping[str, str]
    frontend: Mapping[str, Any]
    generator: Mapping[str, Any]


def import_linear_cae(name: str) -> LinearCaePackage:
    """Import the package.

    Raises:
        ModelError: It is not installed, does not import, or is a withdrawn release.
    """
    install = "pip install 'latentmill[linear-cae]'"
    if sys.version_info >= (3, 13):  # it pins numpy < 2, which has no wheels there
        install = "pip install --no-deps linear-cae==0.1.4"
    try:
        installed = version("linear-cae")
        inference = importlib.import_module("linear_cae.inference")
    except (PackageNotFoundError, ImportError) as error:
        raise ModelError(
            f"Model {name} needs the package linear-cae ({error}): run `{install}`."
        ) from error
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
        frontend_class=inference.ScaledComplexSTFT,
        generator_class=inference.UNet,
    )


def check_weights_only(name: str) -> None:
    """Make sure that the package's plain `torch.load` executes nothing from the file.

    torch 2.6 (our oldest) made `weights_only=True` the default; a variable can undo that.

    Raises:
        ModelError: The variable is set.
    """
    if os.environ.get(UNSAFE_LOAD_VARIABLE, "").lower() in ("1", "y", "yes", "true"):
        raise ModelError(
            f"Model {name}: {UNSAFE_LOAD_VARIABLE} lets a weights file run code; unset it."
        )


def locate(name: str, package: LinearCaePackage) -> ModelFiles:
    """Find the model's files in the Hugging Face cache, downloading those that are missing.

    HF_HOME, HF_ENDPOINT, HF_TOKEN and HF_HUB_OFFLINE have their usual meaning.

    Raises:
        ModelError: They cannot be had, belong to different revisions, or do not fit the package.
    """
    folder = f"{package.folders[name]}_weights"
    paths = {
        role: _download(name, package.repo, f"{folder}/{file}") for role, file in ROLES.items()
    }
    revisions = {path.parents[1].name for path in paths.values()}  # .../snapshots/REVISION/folder/
    if len(revisions) > 1:
        raise ModelError(
            f"Model {name}: its files are of different revisions ({', '.join(sorted(revisions))});"
            f" run `{_download_command(package.repo, folder)}`."
        )
    return ModelFiles(
        repo=package.repo,
        revision=revisions.pop(),
        paths=paths,
        sha256={role: _sha256(path) for role, path in paths.items()},
        frontend=_arguments(name, paths["frontend"], package.frontend_class),
        generator=_arguments(name, paths["generator"], package.generator_class),
    )


def _download(name: str, repo: str, filename: str) -> Path:
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError

    # The bases are the HTTP client's errors, whichever client this huggingface_hub uses.
    hub_errors: tuple[type[Exception], ...] = (OSError, HfHubHTTPError, *HfHubHTTPError.__bases__)
    try:
        return Path(huggingface_hub.hf_hub_download(repo_id=repo, filename=filename))
    except hub_errors as error:
        offline = " (HF_HUB_OFFLINE is set)" if huggingface_hub.constants.HF_HUB_OFFLINE else ""
        command = _download_command(repo, filename.partition("/")[0])
        raise ModelError(
            f"Model {name}: cannot get {filename} of {repo}{offline}: {one_line(error)}; run "
            f"`{command}` where there is a network, or copy a filled cache here and set HF_HOME "
            "and HF_HUB_OFFLINE=1."
        ) from error


def _download_command(repo: str, folder: str) -> str:
    return f"hf download {repo} --include '{folder}/*'"


def one_line(error: BaseException) -> str:
    """What an exception says, on one line of at most 300 characters, without a full stop."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text[:300].rstrip(". ")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _arguments(name: str, path: Path, cls: Callable[..., Any]) -> dict[str, Any]:
    """Read a class's arguments from YAML and fill in its defaults."""
    try:
        given = yaml.safe_load(path.read_text(encoding="utf-8"))
        bound = inspect.signature(cls).bind(**given)
    except (yaml.YAMLError, UnicodeDecodeError, TypeError) as error:
        raise ModelError(
            f"Model {name}: {path} does not fit the installed linear-cae "
            f"({one_line(error)}); delete it and download it again."
        ) from error
    bound.apply_defaults()
    return bound.arguments
