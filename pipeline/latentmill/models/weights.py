"""A model's optional package and its files, which come from the Hugging Face hub or a local path.

HF_HOME, HF_ENDPOINT, HF_TOKEN and HF_HUB_OFFLINE have their usual meaning. Files are downloaded
once into the shared cache (huggingface_hub locks it), and all from one commit. No code in a file
is executed: weights are read as safetensors or by `torch.load(weights_only=True)`.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import json
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from pickle import UnpicklingError  # what torch.load raises; nothing is unpickled here
from types import ModuleType
from typing import Any

import torch

from latentmill.errors import ModelError
from latentmill.models.base import Value
from latentmill.models.hub import Repo, find_on_hub
from latentmill.storage.remote import cause_of
from latentmill.text.printing import one_line

LOAD_ERRORS = (
    ArithmeticError,
    RuntimeError,
    UnpicklingError,
    EOFError,
    OSError,
    AttributeError,
    LookupError,
    TypeError,
    ValueError,
)
WEIGHTS = "weights"  # the role of the file, if a repository is a local file


@dataclass(frozen=True)
class ModelFiles:
    """A model's files. The paths are valid on the machine that found them, the rest everywhere.

    Attributes:
        repo: Where the files come from; the revision of a hub repository is the commit.
        names: File name inside the repository, by role.
        sha256: Hex digests, by role.
        paths: Paths on this machine, by role.
    """

    repo: Repo
    names: Mapping[str, str]
    sha256: Mapping[str, str]
    paths: Mapping[str, Path]

    @property
    def identity(self) -> dict[str, Value]:
        """The digests, as entries of the fingerprint."""
        return {f"sha256_{role}": digest for role, digest in self.sha256.items()}

    @property
    def provenance(self) -> dict[str, Value]:
        return {"repo": self.repo.location, "revision": self.repo.revision}


def import_package(
    model: str, package: str, *, module: str | None = None, install: str | None = None
) -> tuple[ModuleType, str]:
    """Import an optional package; return the module and the package's version.

    The default module and the default extra in the install command have the package's name. `model`
    is for the error message.
    """
    try:
        return importlib.import_module(module or package), version(package)
    except (PackageNotFoundError, ImportError) as error:
        install = install or f"pip install 'latentmill[{package}]'"
        raise ModelError(
            f"Model {model} needs the package {package} ({one_line(error)}): run `{install}`."
        ) from error


@contextlib.contextmanager
def local_files(model: str, path: str | Path) -> Iterator[None]:
    """Raise `ModelError` if a path cannot be looked up or read, such as without permission."""
    try:
        yield
    except (OSError, RuntimeError) as error:  # RuntimeError: no home folder for `~`
        raise ModelError(
            f"Model {model}: {path} cannot be read ({cause_of(error)}): make it readable, or use "
            "another path."
        ) from error


def parse_repo(model: str, text: str, revision: str | None = None) -> Repo:
    """Parse a repository: `owner/name`, or a local path, which begins with `/`, `.` or `~`."""
    if text.startswith(("/", ".", "~")):
        with local_files(model, text):
            path = Path(os.path.abspath(Path(text).expanduser()))  # noqa: PTH100  links stay
            exists = path.exists()
        if not exists:
            raise ModelError(
                f"Model {model}: path not found: {path}; use a folder, a weights file or a hub "
                "repository."
            )
        if revision is not None:
            raise ModelError(
                f"Model {model}: {path} is a local path, which has no revisions; leave out the "
                "option revision."
            )
        return Repo(str(path))
    if text.count("/") != 1 or not all(text.split("/")) or any(c.isspace() for c in text):
        raise ModelError(
            f"Model {model}: {text!r} is not a valid repository; write owner/name, or a local "
            "path that begins with /, ./ or ~."
        )
    return Repo(text, revision)


def find(
    model: str,
    repo: Repo,
    wanted: Mapping[str, Sequence[str]],
    optional: Collection[str] = (),
) -> ModelFiles:
    """Find a model's files; download those that are not in the cache.

    `wanted` has the possible file names of each role, the preferred one first; the roles in
    `optional` may have no file, which the hub or the cache must confirm. If the repository is a
    local file, it is the file of the role `weights`.
    """
    names: dict[str, str] = {}
    paths: dict[str, Path] = {}
    for role, candidates in wanted.items():
        if repo.local:
            with local_files(model, repo.local):
                found = _find_local(repo.local, role, candidates)
        else:
            found = find_on_hub(model, repo, candidates, wanted, role in optional)
        if found is None and role not in optional:
            raise ModelError(
                f"Model {model}: {repo.local} does not contain {' or '.join(candidates)}; copy all "
                "files of the model's repository."
            )
        if found is None:
            continue
        names[role], paths[role] = found
        if repo.local:
            continue
        # The path is .../snapshots/COMMIT/NAME; the other files must be from the same commit.
        repo = Repo(repo.location, paths[role].parents[names[role].count("/")].name)
    return ModelFiles(
        repo, names, {role: _sha256(model, path) for role, path in paths.items()}, paths
    )


def find_again(model: str, files: ModelFiles) -> ModelFiles:
    """Find the same files on another machine; raise `ModelError` if their content differs."""
    found = find(model, files.repo, {role: [name] for role, name in files.names.items()})
    differing = [role for role, digest in files.sha256.items() if digest != found.sha256[role]]
    if differing:
        raise ModelError(
            f"Model {model}: the {', '.join(differing)} file of {files.repo.text} on this "
            "machine differs from the one that this run started with; copy the same files to "
            "every machine, or start the run again."
        )
    return found


def read_state(
    model: str, path: Path, entry: str | None = None, *, prefix: str = ""
) -> dict[str, torch.Tensor]:
    """Read a state dict from a .safetensors file or from a file of `torch.save`.

    `entry` is the state dict's key in a training checkpoint of `torch.save`. Tensors whose names do
    not begin with `prefix` are left out. Raises `ModelError` if the file is damaged or has anything
    else than tensors by name.
    """
    try:
        if path.suffix == ".safetensors":
            state = _read_safetensors(model, path, prefix)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
            state = state if entry is None else state[entry]
    except LOAD_ERRORS as error:
        raise does_not_load(model, path, error) from error
    if not isinstance(state, dict) or not all(isinstance(v, torch.Tensor) for v in state.values()):
        raise does_not_load(model, path, ValueError("it contains more than tensors by name"))
    return {name: value for name, value in state.items() if name.startswith(prefix)}


def read_config(model: str, path: Path) -> dict[str, Any]:
    """Read a JSON object; raise `ModelError` if the file has anything else."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise TypeError("it is not a JSON object")
    except (ValueError, TypeError) as error:
        raise does_not_load(model, path, error) from error
    return config


def does_not_load(model: str, path: Path, error: BaseException) -> ModelError:
    """The error for a file that exists but cannot be used."""
    on_hub = "snapshots" in path.parts  # of the cache of huggingface_hub
    fix = "delete it and download it again" if on_hub else "replace it with an undamaged copy"
    # PyTorch's text for these advises to load files that can run code.
    unsafe = isinstance(error, UnpicklingError)
    reason = "it is damaged or contains more than tensors" if unsafe else one_line(error)
    return ModelError(f"Model {model}: {path} does not load ({reason}); {fix}.")


def _find_local(local: Path, role: str, candidates: Sequence[str]) -> tuple[str, Path] | None:
    if local.is_file() and role == WEIGHTS:
        return local.name, local
    folder = local.parent if local.is_file() else local
    found = (name for name in candidates if (folder / name).is_file())
    return next(((name, folder / name) for name in found), None)


def _read_safetensors(model: str, path: Path, prefix: str) -> dict[str, torch.Tensor]:
    package, _ = import_package(model, "safetensors", install="pip install safetensors")
    try:
        with package.safe_open(path, framework="pt") as file:
            return {n: file.get_tensor(n) for n in file.keys() if n.startswith(prefix)}  # noqa: SIM118
    except package.SafetensorError as error:
        raise ValueError(str(error)) from error


def _sha256(model: str, path: Path) -> str:
    with local_files(model, path), path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
