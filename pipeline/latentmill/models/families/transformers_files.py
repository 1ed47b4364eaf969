"""Configurations, weights and tokenizers of transformers, from files that are found and hashed.

Nothing else is read, so the hashes identify the model, and no code of a repository is executed.
"""

from __future__ import annotations

import importlib
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

import torch

from latentmill.errors import ModelError
from latentmill.models.hub import Repo
from latentmill.models.weights import (
    LOAD_ERRORS,
    ModelFiles,
    does_not_load,
    find,
    import_package,
    read_config,
    read_state,
)

CONFIG = {"config": ["config.json"]}
WEIGHTS_FILES = [
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
]
_INDEX = ".index.json"
# Of the first file that exists the others depend on the tokenizer's class.
_TOKENIZER = ["tokenizer.json", "spiece.model", "tokenizer.model", "vocab.txt", "vocab.json"]
_TOKENIZER_OPTIONS = {
    "tokenizer_config": "tokenizer_config.json",
    "special_tokens": "special_tokens_map.json",
    "added_tokens": "added_tokens.json",
    "merges": "merges.txt",
}


def find_encoder(
    model: str, repo: Repo, extra: Mapping[str, Sequence[str]], *, tokenizer: bool
) -> ModelFiles:
    """Find the files of an encoder: configuration, weights in any number of files, tokenizer.

    If the root has no config.json, the folders `text_encoder` and `tokenizer` of a repository of
    diffusers are used. `extra` are other files that the encoder needs.
    """
    config = find(model, repo, {"config": ["config.json", "text_encoder/config.json"]})
    nested = config.names["config"] != "config.json"
    folder, words = ("text_encoder/", "tokenizer/") if nested else ("", "")
    wanted = {role: list(names) for role, names in extra.items()}
    wanted["weights"] = [folder + name for name in WEIGHTS_FILES]
    optional: set[str] = set()
    if tokenizer:
        wanted["tokenizer"] = [words + name for name in _TOKENIZER]
        wanted |= {role: [words + name] for role, name in _TOKENIZER_OPTIONS.items()}
        optional = set(_TOKENIZER_OPTIONS)
    files = _joined(config, find(model, config.repo, wanted, optional))
    if files.names.get("tokenizer", "").endswith(".model"):
        import_package(model, "sentencepiece", install="pip install sentencepiece protobuf")
    if not files.names["weights"].endswith(_INDEX):
        return files
    parts = sorted(set(_weight_map(model, files).values()))
    shards = {f"weights_{number}": [folder + part] for number, part in enumerate(parts, 1)}
    return _joined(files, find(model, files.repo, shards))


def _joined(one: ModelFiles, other: ModelFiles) -> ModelFiles:
    return ModelFiles(
        other.repo,
        {**one.names, **other.names},
        {**one.sha256, **other.sha256},
        {**one.paths, **other.paths},
    )


def _weight_map(model: str, files: ModelFiles) -> dict[str, str]:
    path = files.paths["weights"]
    parts = read_config(model, path).get("weight_map")
    if not isinstance(parts, dict) or not all(
        isinstance(name, str) and PurePosixPath(name).name == name for name in parts.values()
    ):
        raise does_not_load(model, path, ValueError("it does not list files of weights"))
    return parts


def read_weights(model: str, files: ModelFiles) -> dict[str, torch.Tensor]:
    """Read the state dict from the files of the roles `weights`, `weights_1`, ..."""
    if not files.names["weights"].endswith(_INDEX):
        return read_state(model, files.paths["weights"])
    state: dict[str, torch.Tensor] = {}
    for role, path in files.paths.items():
        if role.startswith("weights_"):
            state |= read_state(model, path)
    return state


def model_config(model: str, files: ModelFiles, *model_types: str) -> Any:
    """Parse config.json; raise `ModelError` if it belongs to another type than `model_types`."""
    from huggingface_hub.errors import StrictDataclassError

    package, _ = import_package(model, "transformers")
    path = files.paths["config"]
    given = read_config(model, path)
    try:
        if model_types and given.get("model_type") not in model_types:
            found = given.get("model_type") or given.get("_class_name")
            raise ValueError(f"it belongs to {found}")
        return package.AutoConfig.for_model(**_without_code(model, given))
    except (*LOAD_ERRORS, StrictDataclassError, ImportError) as error:
        raise does_not_load(model, path, error) from error


def _without_code(model: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration without the names of implementations, which can be code on the hub.

    It raises `ModelError` for quantised weights, because the network is built in float32.
    """
    if given.get("quantization_config") is not None:
        raise ModelError(
            f"Model {model} has quantised weights: use a repository with weights that are not."
        )
    return {
        name: _without_code(model, value) if isinstance(value, dict) else value
        for name, value in given.items()
        if not name.lstrip("_").startswith(("attn_implementation", "experts_implementation"))
    }


def load_network(
    model: str, files: ModelFiles, config: Any, class_: Any, unused: Sequence[str] = ()
) -> Any:
    """Build a network in float32 from its configuration and state dict, in inference mode.

    `from_pretrained` gets the tensors, not a path: it renames those of older releases but reads
    no file itself. It would initialise missing tensors at random, so they are an error, except
    those of the names `unused`.
    """
    state = read_weights(model, files)
    try:
        with quiet_transformers():
            network, report = class_.from_pretrained(
                None,
                config=config,
                state_dict=state,
                dtype=torch.float32,
                output_loading_info=True,
            )
        wrong = [*report["missing_keys"], *report["mismatched_keys"], *report["error_msgs"]]
        wrong = [each for each in wrong if each not in unused]
        if wrong:
            raise ValueError(f"{len(wrong)} tensors are missing or do not fit, such as {wrong[0]}")
    except (*LOAD_ERRORS, ImportError) as error:
        raise does_not_load(model, files.paths["weights"], error) from error
    return network.eval().requires_grad_(False)


def load_tokenizer(model: str, files: ModelFiles) -> Any:
    """Load the tokenizer from its files alone, without the code of a repository."""
    package, _ = import_package(model, "transformers")
    roles = ("config", "tokenizer", *_TOKENIZER_OPTIONS)
    with tempfile.TemporaryDirectory(prefix="latentmill-tokenizer-") as folder:
        for role in roles:
            if role in files.paths:
                name = PurePosixPath(files.names[role]).name
                (Path(folder) / name).symlink_to(files.paths[role].absolute())
        try:
            with quiet_transformers():
                return package.AutoTokenizer.from_pretrained(
                    folder, trust_remote_code=False, local_files_only=True
                )
        except (*LOAD_ERRORS, ImportError) as error:
            raise does_not_load(model, files.paths["tokenizer"], error) from error


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Turn off the progress bar and the loading report; `load_network` raises the errors in it."""
    logging = importlib.import_module("transformers.utils.logging")
    bar, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bar:
            logging.enable_progress_bar()
