"""Codecs of transformers: files, loading, quantisation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol, cast

import torch
from torch import Tensor

from latentmill.errors import ModelError
from latentmill.models.base import ModelSpec, Value
from latentmill.models.families.codec import (
    CodecHandle,
    FoundCodec,
    Network,
    StatefulNetwork,
    check_scale_factor,
    make_handle,
)
from latentmill.models.families.transformers_files import load_network, model_config
from latentmill.models.weights import ModelFiles, find, import_package, parse_repo

if TYPE_CHECKING:
    from latentmill.models.base import State

WANTED = {"config": ["config.json"], "weights": ["model.safetensors", "pytorch_model.bin"]}
LENGTHS = ("stride", "kernel_size", "padding_total")  # buffers of convolutions

Output = Literal["latents", "codes"]


class QuantisingNetwork(Network, Protocol):
    """A network with a quantiser, which its `encode` and `decode` do not use."""

    def quantise(self, latents: Tensor) -> Tensor:
        """Quantise `[B, D, Z]` to codes `[B, codebooks, Z]`: whole numbers as float32."""
        ...

    def dequantise(self, codes: Tensor) -> Tensor:
        """Look up the latents `[B, D, Z]` of codes `[B, codebooks, Z]` from `quantise`."""
        ...


@dataclass(frozen=True)
class QuantisedDecoder:
    """A network that quantises latents before it decodes them, as the codec does."""

    inner: QuantisingNetwork

    def encode(self, audio: Tensor) -> Tensor:
        return self.inner.encode(audio)

    def encode_step(
        self, audio: Tensor, states: Sequence[State | None]
    ) -> tuple[Tensor, list[State]]:
        return cast(StatefulNetwork, self.inner).encode_step(audio, states)

    def decode(self, latents: Tensor) -> Tensor:
        return self.inner.decode(self.inner.dequantise(self.inner.quantise(latents)))


@dataclass(frozen=True)
class Codes:
    """A network whose latents are its codes."""

    inner: QuantisingNetwork

    def encode(self, audio: Tensor) -> Tensor:
        """Encode to codes; an autocast region around the call does not affect the quantiser."""
        return self._quantised(self.inner.encode(audio))

    def encode_step(
        self, audio: Tensor, states: Sequence[State | None]
    ) -> tuple[Tensor, list[State]]:
        latents, after = cast(StatefulNetwork, self.inner).encode_step(audio, states)
        return self._quantised(latents), after

    def _quantised(self, latents: Tensor) -> Tensor:
        with torch.autocast(latents.device.type, enabled=False):
            return self.inner.quantise(latents.float())

    def decode(self, latents: Tensor) -> Tensor:
        return self.inner.decode(self.inner.dequantise(latents))


@dataclass(frozen=True)
class CodecFamily:
    """A family of codecs with a quantiser, and the `NetworkLoader` of its networks.

    Attributes:
        name: The family's name and its `model_type` in transformers.
        network: Class of the network, which takes the model of transformers.
        spec_of: Reads a configuration; the second argument is whether latents are codes.
    """

    name: str
    network: Callable[[Any], QuantisingNetwork]
    spec_of: Callable[[Any, bool], ModelSpec]

    def __call__(
        self, name: str, files: ModelFiles, device: torch.device, **options: Value
    ) -> Network:
        """Build a network; see `NetworkLoader`."""
        network = self.network(_load(name, files, device, self.name))
        if options["output"] == "codes":
            return Codes(network)
        return QuantisedDecoder(network) if options["quantise"] else network


@dataclass(frozen=True)
class ContinuousFamily:
    """A family of autoencoders without a quantiser, and the `NetworkLoader` of its networks.

    Attributes:
        name: The family's name.
        model_type: Its `model_type` in transformers.
        network: Class of the network, which takes the model of transformers.
        spec_of: Reads a configuration.
    """

    name: str
    model_type: str
    network: Callable[[Any], Network]
    spec_of: Callable[[Any], ModelSpec]

    def __call__(
        self, name: str, files: ModelFiles, device: torch.device, **options: Value
    ) -> Network:
        """Build a network; see `NetworkLoader`."""
        return self.network(_load(name, files, device, self.model_type))


def _load(name: str, files: ModelFiles, device: torch.device, model_type: str) -> Any:
    package, _ = import_package(name, "transformers")
    config = model_config(name, files, model_type)
    model = load_network(name, files, config, package.MODEL_MAPPING[type(config)])
    move(model, device)
    return model


def build_codec(
    family: CodecFamily,
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
    if output == "codes" and (scale_factor != 1 or quantise):
        option = "quantise" if quantise else "scale_factor"
        raise ModelError(f"Model {name}: option {option} has no meaning for codes; leave it out.")
    scale = check_scale_factor(name, scale_factor)
    return make_handle(
        _find(name, repo, revision, family.name),
        lambda config: family.spec_of(config, output == "codes"),
        family,
        scale_factor=scale,
        encoding={"output": output},
        decoding={"quantise": quantise},
    )


def build_continuous(
    family: ContinuousFamily, repo: str, *, revision: str | None = None, scale_factor: float = 1.0
) -> CodecHandle:
    """Find the files of a model without a quantiser and make its handle."""
    name = f"{family.name}:{repo}"
    scale = check_scale_factor(name, scale_factor)
    found = _find(name, repo, revision, family.model_type)
    return make_handle(found, family.spec_of, family, scale_factor=scale)


def _find(name: str, repo: str, revision: str | None, model_type: str) -> FoundCodec:
    _, version = import_package(name, "transformers")
    files = find(name, parse_repo(name, repo, revision), WANTED)
    config = model_config(name, files, model_type)
    return FoundCodec(name, files, config, "transformers", version)


def check_causal(family: str, config: Any) -> None:
    """Raise `ModelError` if the convolutions of Mimi or Pocket TTS are not causal."""
    if not config.use_causal_conv:
        raise ModelError(
            f"The configuration of this model of {family} has use_causal_conv false, so frames "
            "depend on later audio: use hf:REPO, which measures how much of it."
        )


def as_indices(codes: Tensor, codebook_size: int) -> Tensor:
    """Convert codes to integers; raise `ModelError` if they were mixed, scaled or changed."""
    indices = codes.long()
    if not bool(((indices == codes) & (indices >= 0) & (indices < codebook_size)).all()):
        raise ModelError(
            f"The latents contain values that are not codes (whole numbers from 0 to "
            f"{codebook_size - 1}): decode the codes unchanged, they cannot be mixed or scaled."
        )
    return indices


def move(model: torch.nn.Module, device: torch.device) -> None:
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
