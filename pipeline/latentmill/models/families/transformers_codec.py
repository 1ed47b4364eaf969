"""Finding and loading models of transformers, for `encodec`, `dac` and `mimi`."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from latentmill.models.base import ModelSpec
from latentmill.models.families.codec import (
    CodecHandle,
    FoundCodec,
    Loader,
    Output,
    check_output,
    make_handle,
)
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


@dataclass(frozen=True)
class Family:
    """A family of codecs.

    Attributes:
        name: The family's name and its `model_type` in transformers.
        loader: Builds the network.
        spec_of: Reads a configuration; the second argument is whether latents are codes.
    """

    name: str
    loader: Loader
    spec_of: Callable[[Any, bool], ModelSpec]


def build_codec(
    family: Family,
    repo: str,
    *,
    revision: str | None = None,
    scale_factor: float = 1.0,
    quantise: bool = False,
    output: Output = "latents",
) -> CodecHandle:
    """Find a model's files and make its handle; docs/models.md describes the options.

    With `quantise` decoding quantises the latents first, at the highest bandwidth, as the codec
    does; it does not change the stored latents. `output` is `latents` (before quantisation) or
    `codes` (`[codebooks, frames]`, whole numbers).
    """
    name = f"{family.name}:{repo}"
    scale = check_output(name, output, scale_factor, quantise)
    _, version = import_package(name, "transformers")
    files = find(name, parse_repo(name, repo, revision), WANTED)
    config = _config(name, files, family.name)
    return make_handle(
        FoundCodec(name, files, config, "transformers", version),
        lambda config: family.spec_of(config, output == "codes"),
        family.loader,
        scale_factor=scale,
        encoding={"output": output},
        decoding={"quantise": quantise},
    )


def load_model(name: str, model_type: str, files: ModelFiles, device: torch.device) -> Any:
    """Build a model in float32 from its configuration and its state dict.

    `from_pretrained` gets the tensors, not a path: it renames those of older releases but reads no
    file itself. It would initialise missing tensors at random, so they are an error.
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
            raise ValueError(f"it belongs to {found}")
        return package.AutoConfig.for_model(**given)
    except (*LOAD_ERRORS, StrictDataclassError) as error:
        raise does_not_load(name, path, error) from error


def _move(model: torch.nn.Module, device: torch.device) -> None:
    """Move a model to a device, but leave the buffers on the CPU that padding is computed from.

    The convolutions of EnCodec and Mimi keep stride and kernel size as tensors and convert them to
    Python numbers in every call. On a GPU each conversion would wait for the device.
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
    """Turn off the progress bar and the loading report; `load_model` raises the errors in it."""
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
