"""The factory of `hf:REPO`."""

from __future__ import annotations

import inspect
import math
import re
from dataclasses import dataclass
from typing import Any

import torch

from latentmill.errors import ModelError
from latentmill.models.base import Value
from latentmill.models.families.codec import (
    CodecHandle,
    FoundCodec,
    check_scale_factor,
    make_handle,
)
from latentmill.models.families.hf.measured import MeasuredTokenizer, from_cache, measure
from latentmill.models.families.hf.network import TokenizerNetwork
from latentmill.models.families.transformers_codec import move
from latentmill.models.families.transformers_files import load_network, model_config
from latentmill.models.probing.subject import CALL_ERRORS
from latentmill.models.weights import (
    ModelFiles,
    does_not_load,
    find,
    import_package,
    parse_repo,
    read_config,
)
from latentmill.text.printing import one_line

WANTED = {
    "config": ["config.json"],
    "weights": ["model.safetensors", "pytorch_model.bin"],
    "preprocessor": ["preprocessor_config.json"],
}
RATES = ("input_sampling_rate", "sampling_rate", "sample_rate")
CHANNELS = ("audio_channels", "channels")
HOPS = ("encoder_hop_length", "hop_length", "frame_size")
RATIOS = ("downsampling_ratios", "upsampling_ratios", "encoder_ratios")


@dataclass(frozen=True)
class TokenizerLoader:
    """The `NetworkLoader` of `hf:`."""

    def __call__(
        self, name: str, files: ModelFiles, device: torch.device, **options: Value
    ) -> TokenizerNetwork:
        """Build a network; see `NetworkLoader`."""
        network = _load(name, files, device)
        MeasuredTokenizer.parse(str(options["measured"])).apply(network)
        return network


def build(
    repo: str,
    *,
    revision: str | None = None,
    scale_factor: float = 1.0,
    measured: str | None = None,
) -> CodecHandle:
    """Find a tokenizer's files, measure it unless it was measured before, and make its handle.

    `measured` are values that were measured before, as in `spec.identity`.
    """
    name = f"hf:{repo}"
    scale = check_scale_factor(name, scale_factor)
    _, version = import_package(name, "transformers")
    files = find(name, parse_repo(name, repo, revision), WANTED, {"preprocessor"})
    _check_type(name, files)
    config = model_config(name, files)
    class_of(name, config)
    rate, channels = _rate_and_channels(name, config, _extractor(name, files, config))

    def measure_now() -> MeasuredTokenizer:
        network = _load(name, files, torch.device("cpu"))
        try:
            return measure(network, rate, channels, _hops(config, rate))
        except CALL_ERRORS as error:
            raise ModelError(
                f"Model {name}: a model of type {config.model_type} gives no continuous latents "
                f"that can be stored ({one_line(error)}): use {_instead(config.model_type)}."
            ) from error

    if measured is None:
        found = from_cache(files, (version, torch.__version__), measure_now)
    else:
        found = _given(name, measured)
    return make_handle(
        FoundCodec(name, files, config, "transformers", version),
        lambda _: found.spec(rate, channels),
        TokenizerLoader(),
        scale_factor=scale,
        encoding={"model_type": config.model_type, "measured": found.text()},
    )


def _given(name: str, measured: str) -> MeasuredTokenizer:
    try:
        return MeasuredTokenizer.parse(measured)
    except (ValueError, TypeError, LookupError) as error:
        raise ModelError(
            f"Model {name}: this version of latentmill cannot read the measurements in option "
            f"measured or in the store ({one_line(error)}): leave the option out, or restore "
            "plan.json and dataset.json of the store."
        ) from error


def _check_type(name: str, files: ModelFiles) -> None:
    package, _ = import_package(name, "transformers")
    found = read_config(name, files.paths["config"]).get("model_type")
    if isinstance(found, str) and found in package.CONFIG_MAPPING:
        return
    known = f"the type {found!r}, which the installed transformers does not have"
    reason = "no model_type, so it is not a model of transformers" if found is None else known
    raise ModelError(f"Model {name}: config.json has {reason}: use {_instead(str(found))}.")


def class_of(name: str, config: Any) -> Any:
    """The tokenizer's class; ModelError if the configuration belongs to another kind of model."""
    package, _ = import_package(name, "transformers")
    for mapping in (package.MODEL_FOR_AUDIO_TOKENIZATION_MAPPING, package.MODEL_MAPPING):
        try:
            found = mapping.get(type(config), None)
            both = hasattr(found, "encode") and hasattr(found, "decode")
        except (ImportError, OSError) as error:  # of a package that the type needs
            raise _lacks(name, config, error) from error
        if both and "input_values" in inspect.signature(found.encode).parameters:
            return found
    raise ModelError(
        f"Model {name}: a model of type {config.model_type} is not an audio tokenizer: use "
        f"{_instead(config.model_type)}."
    )


def _instead(model_type: str) -> str:
    from latentmill.models.catalogue import FAMILIES

    named = f"{model_type}:REPO, or " if model_type in FAMILIES else ""
    return f"{named}a model that `latentmill models` lists, or write python:package.module:factory"


def _lacks(name: str, config: Any, error: ImportError | OSError) -> ModelError:
    begin = f"Model {name}: transformers needs another package for a model of type"
    reason = one_line(error)
    if isinstance(error, OSError):
        return ModelError(
            f"{begin} {config.model_type}, which cannot be loaded ({reason}): install it from the "
            "package index that PyTorch is from."
        )
    missing = re.search(r"requires the (\w+) library", reason)
    package = error.name if missing is None else missing[1]
    fix = f"run `pip install {package}`" if package else f"install it ({reason})"
    return ModelError(f"{begin} {config.model_type}: {fix}.")


def _load(name: str, files: ModelFiles, device: torch.device) -> TokenizerNetwork:
    config = model_config(name, files)
    extractor = _extractor(name, files, config)
    rate, channels = _rate_and_channels(name, config, extractor)
    class_ = class_of(name, config)
    try:
        model = load_network(name, files, config, class_)
    except ImportError as error:
        raise _lacks(name, config, error) from error
    move(model, device)
    # Some models encode features that only their feature extractor computes.
    needs = "input_features" in inspect.signature(class_.encode).parameters
    return TokenizerNetwork(model, extractor if needs else None, rate, channels)


def _extractor(name: str, files: ModelFiles, config: Any) -> Any:
    """The feature extractor, with the repository's settings; None if the type has none."""
    package, _ = import_package(name, "transformers")
    class_ = package.FEATURE_EXTRACTOR_MAPPING.get(type(config), None)
    if class_ is None:
        return None
    given = read_config(name, files.paths["preprocessor"]) if "preprocessor" in files.paths else {}
    try:
        return class_(**{n: v for n, v in given.items() if n != "feature_extractor_type"})
    except (ImportError, OSError) as error:
        raise _lacks(name, config, error) from error
    except CALL_ERRORS as error:
        raise does_not_load(name, files.paths["preprocessor"], error) from error


def _rate_and_channels(name: str, config: Any, extractor: Any) -> tuple[int, int]:
    rate = _first(config, RATES) or getattr(extractor, "sampling_rate", None)
    if not isinstance(rate, int) or rate < 1:
        raise ModelError(
            f"Model {name}: neither config.json nor preprocessor_config.json has its sample rate: "
            "copy all files of the model's repository."
        )
    return rate, _first(config, CHANNELS) or 1


def _hops(config: Any, rate: int) -> list[int]:
    """Likely numbers of samples per frame."""
    hops = [getattr(config, name, None) for name in HOPS]
    for name in RATIOS:
        ratios = getattr(config, name, None)
        if isinstance(ratios, list | tuple) and ratios:
            hops.append(math.prod(ratios))
            hops.append(math.prod(ratios) * getattr(config, "latent_stride", 1))
    frame_rate = getattr(config, "frame_rate", None)
    if frame_rate:
        hops.append(round(rate / frame_rate))
    return list(dict.fromkeys(hop for hop in hops if isinstance(hop, int) and hop > 0))


def _first(config: Any, names: tuple[str, ...]) -> Any:
    return next((v for n in names if (v := getattr(config, n, None)) is not None), None)
