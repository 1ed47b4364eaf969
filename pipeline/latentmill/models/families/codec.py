"""What the models of diffusers and transformers share: a deterministic network and its files."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from latentmill.errors import ModelError
from latentmill.models.base import ModelSpec, Value
from latentmill.models.checks import check_audio, check_device, check_latents, no_gradients
from latentmill.models.weights import ModelFiles, find_again

Output = Literal["latents", "codes"]


class Network(Protocol):
    """A family's own code: unscaled latents of audio, and audio of unscaled latents."""

    def encode(self, audio: Tensor) -> Tensor:
        """Encode `[B, C, T]`, T a multiple of the hop, to `[B, D, T / hop]`."""
        ...

    def decode(self, latents: Tensor) -> Tensor:
        """Decode `[B, D, Z]` to `[B, C, Z * hop]`, or a few samples fewer."""
        ...


class QuantisingNetwork(Network, Protocol):
    """A network with a quantiser between encoder and decoder, not in use by itself."""

    def quantise(self, latents: Tensor) -> Tensor:
        """Quantise `[B, D, Z]` to codes `[B, codebooks, Z]`, whole numbers in float32."""
        ...

    def dequantise(self, codes: Tensor) -> Tensor:
        """Look up codes `[B, codebooks, Z]`, as `quantise` gives them, as latents `[B, D, Z]`."""
        ...


@dataclass(frozen=True)
class QuantisedDecoder:
    """A network whose decoder hears quantised latents, as the codec's own does."""

    inner: QuantisingNetwork

    def encode(self, audio: Tensor) -> Tensor:
        """Latents before quantisation."""
        return self.inner.encode(audio)

    def decode(self, latents: Tensor) -> Tensor:
        """Quantise and decode."""
        return self.inner.decode(self.inner.dequantise(self.inner.quantise(latents)))


@dataclass(frozen=True)
class Codes:
    """A network whose latents are its codes."""

    inner: QuantisingNetwork

    def encode(self, audio: Tensor) -> Tensor:
        """Codes; an autocast region around the call does not reach the quantiser."""
        latents = self.inner.encode(audio)
        with torch.autocast(audio.device.type, enabled=False):
            return self.inner.quantise(latents.float())

    def decode(self, latents: Tensor) -> Tensor:
        """Decode codes."""
        return self.inner.decode(self.inner.dequantise(latents))


class Loader(Protocol):
    """Builds a family's network on a device; a function at module level, so that it travels."""

    def __call__(
        self, name: str, files: ModelFiles, device: torch.device, **options: Value
    ) -> Network:
        """Load the files.

        Raises:
            ModelError: They do not fit the network.
        """
        ...


@dataclass(frozen=True)
class CodecHandle:
    """A model whose files are found and hashed.

    Attributes:
        spec: Its spec.
        files: Its files.
        loader: What builds the network.
        options: The loader's options.
    """

    spec: ModelSpec
    files: ModelFiles
    loader: Loader
    options: Mapping[str, Value] = field(default_factory=dict)

    def load(self, device: str) -> Codec:
        """Load the model onto `device`.

        Raises:
            ModelError: The files are missing here, differ from the handle's or do not load.
        """
        name = self.spec.name
        chosen = check_device(name, device)
        files = find_again(name, self.files)
        return Codec(self.spec, self.loader(name, files, chosen, **self.options), chosen)


class Codec:
    """A network on one device, behind the protocol `Autoencoder`."""

    def __init__(self, spec: ModelSpec, network: Network, device: torch.device) -> None:
        self._spec = spec
        self._network = network
        self._device = device

    @property
    def spec(self) -> ModelSpec:
        """What is fixed about this model."""
        return self._spec

    @no_gradients
    def encode(self, audio: Tensor) -> Tensor:
        """Encode `[B, C, T]` to `[B, D, Z]`; see `Autoencoder.encode`."""
        check_audio(self._spec, audio)
        latents = self._network.encode(audio.to(self._device))
        return latents.float() * self._spec.scale_factor

    @no_gradients
    def decode(
        self,
        latents: Tensor,
        num_samples: int,
        *,
        seed: int = 0,
        positions: Sequence[int] | None = None,
    ) -> Tensor:
        """Decode `[B, D, Z]` to `[B, C, num_samples]`; the seed has no effect.

        A decoder with odd strides gives up to a few samples less than its frames stand for: the
        end is filled up with zeros.
        """
        del seed
        check_latents(self._spec, latents, num_samples, positions)
        wave = self._network.decode(latents.to(self._device) / self._spec.scale_factor).float()
        missing = num_samples - wave.shape[-1]
        return F.pad(wave, (0, missing)) if missing > 0 else wave[..., :num_samples]


def with_quantiser(network: QuantisingNetwork, *, quantise: Value, output: Value) -> Network:
    """A network as the options `quantise` and `output` want it."""
    if output == "codes":
        return Codes(network)
    return QuantisedDecoder(network) if quantise else network


def as_indices(codes: Tensor, codebook_size: int) -> Tensor:
    """Codes as integers.

    Raises:
        ModelError: They are no codes: mixed, scaled or otherwise changed.
    """
    indices = codes.long()
    if not bool(((indices == codes) & (indices >= 0) & (indices < codebook_size)).all()):
        raise ModelError(
            f"Codes are whole numbers from 0 to {codebook_size - 1}, and these are not: decode "
            "them as they are stored, since codes cannot be mixed or scaled."
        )
    return indices


def check_output(name: str, output: Output, scale_factor: float, quantise: bool) -> float:
    """Check the options of a codec; gives the scale factor.

    Raises:
        ModelError: The scale factor is not positive and finite, or codes are to be scaled or
            quantised.
    """
    if output == "codes" and (scale_factor != 1 or quantise):
        option = "quantise" if quantise else "scale_factor"
        raise ModelError(f"Model {name}: option {option} has no meaning for codes; leave it out.")
    return check_scale_factor(name, scale_factor)


def check_scale_factor(name: str, scale_factor: float) -> float:
    """Check an option that all models have.

    Raises:
        ModelError: It is not positive and finite.
    """
    if not (math.isfinite(scale_factor) and scale_factor > 0):
        raise ModelError(f"Model {name}: option scale_factor must be positive, not {scale_factor}.")
    return float(scale_factor)


def dac_encoder_context(strides: Sequence[int]) -> int:
    """Latent frames on each side that a frame of a DAC encoder (and Oobleck's) depends on.

    R. Kumar and others, "High-Fidelity Audio Compression with Improved RVQGAN", NeurIPS 2023: a
    convolution of 7; for each stride s, at that rate, three residual units (7 taps, dilated by 1,
    3 and 9) and a convolution of 2 s taps, which reaches ceil(s / 2) beyond its frame; last a
    convolution of 3. For the published strides it is 8.
    """
    reach, rate = 3, 1  # input samples; samples per step at this depth
    for stride in strides:
        reach += rate * (3 * (1 + 3 + 9) + math.ceil(stride / 2))
        rate *= stride
    return math.ceil((reach + rate) / rate)
