"""What the models of diffusers and transformers share: a deterministic network and its files."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from latentmill.errors import ModelError
from latentmill.models.base import ModelSpec, Value
from latentmill.models.checks import check_audio, check_device, check_latents
from latentmill.models.weights import ModelFiles, find_again


class Network(Protocol):
    """A family's own code: unscaled latents of audio, and audio of unscaled latents."""

    def encode(self, audio: Tensor) -> Tensor:
        """Encode `[B, C, T]`, T a multiple of the hop, to `[B, D, T / hop]`."""
        ...

    def decode(self, latents: Tensor) -> Tensor:
        """Decode `[B, D, Z]` to `[B, C, Z * hop]`, or a few samples fewer."""
        ...


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

    @torch.inference_mode()
    def encode(self, audio: Tensor) -> Tensor:
        """Encode `[B, C, T]` to `[B, D, Z]`; see `Autoencoder.encode`."""
        check_audio(self._spec, audio)
        latents = self._network.encode(audio.to(self._device))
        return latents.float() * self._spec.scale_factor

    @torch.inference_mode()
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
