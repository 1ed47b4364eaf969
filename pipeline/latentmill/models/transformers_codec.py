"""What `encodec`, `dac` and `mimi` share: finding and loading models of transformers."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

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

WANTED = {"config": ["config.json"], "weights": ["model.safetensors", "pytorch_model.bin"]}
LENGTHS = ("stride", "kernel_size", "padding_total")  # buffers of convolutions


def find_model(
    name: str, model_type: str, repo: str, revision: str | None
) -> tuple[ModelFiles, Any, str]:
    """Find a model's files and read its configuration.

    Args:
        name: The model's name, for errors.
        model_type: What `config.json` must say.
        repo: Hub repository, local folder, or local weights file beside its `config.json`.
        revision: Branch, tag or commit of a hub repository.

    Returns:
        The files, the configuration (a `PretrainedConfig`), and the version of transformers.

    Raises:
        ModelError: The package or the weights are missing, or they are another model's.
    """
    _, version = import_package(name, "transformers")
    files = find(name, parse_repo(name, repo, revision), WANTED)
    return files, _config(name, files, model_type), version


def load_model(name: str, model_type: str, files: ModelFiles, device: torch.device) -> Any:
    """Build a model from its configuration and its state dict, in float32.

    `from_pretrained` is given the tensors, not a path, so that it renames those of older releases
    and reads no file itself. It fills in random numbers for missing ones: that is refused.

    Raises:
        ModelError: The weights do not fit the configuration.
    """
    package, _ = import_package(name, "transformers")
    config = _config(name, files, model_type)
    state = read_state(name, files.paths["weights"])
    try:
        with _quiet_transformers():
            model, report = package.MODEL_MAPPING[type(config)].from_pretrained(
                None, config=config, state_dict=state, dtype=torch.float32, output_loading_info=True
            )
        wrong = [*report["missing_keys"], *report["mismatched_keys"], *report["error_msgs"]]
        if wrong:
            raise ValueError(f"{len(wrong)} tensors are missing or do not fit, such as {wrong[0]}")
    except LOAD_ERRORS as error:
        raise does_not_load(name, files.paths["weights"], error) from error
    model = model.eval().requires_grad_(False)
    _move(model, device)
    return model


def _config(name: str, files: ModelFiles, model_type: str) -> Any:
    from huggingface_hub.errors import StrictDataclassError

    package, _ = import_package(name, "transformers")
    path = files.paths["config"]
    given = read_config(name, path)
    try:
        if given.get("model_type") != model_type:
            found = given.get("model_type") or given.get("_class_name")
            raise ValueError(f"it is of {found}")
        return package.AutoConfig.for_model(**given)
    except (*LOAD_ERRORS, StrictDataclassError) as error:
        raise does_not_load(name, path, error) from error


def _move(model: torch.nn.Module, device: torch.device) -> None:
    """Move a model to a device, but leave on the CPU what padding is computed from.

    EnCodec's and Mimi's convolutions hold stride and kernel size as tensors and turn them into
    Python numbers in every call, each time waiting for a GPU that holds them.
    """
    kept = [
        (module, name, buffer)
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if name in LENGTHS
    ]
    model.to(device)
    for module, name, buffer in kept:
        module._buffers[name] = buffer


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Without its progress bar and its report, whose faults we raise."""
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
