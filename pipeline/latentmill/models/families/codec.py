"""Code shared by deterministic models: a codec of a network and, for most, its files."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol, cast

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from latentmill.errors import ModelError
from latentmill.models.base import Context, ModelSpec, Stitch, Value
from latentmill.models.checks import check_audio, check_device, check_latents, no_gradients
from latentmill.models.weights import LOAD_ERRORS, ModelFiles, does_not_load, find_again

if TYPE_CHECKING:
    from latentmill.models.base import State

CHUNK_SECONDS = 10.0


class Network(Protocol):
    """A family's own code: audio to unscaled latents and back."""

    def encode(self, audio: Tensor) -> Tensor:
        """Encode `[B, C, T]`, T a multiple of the hop, to `[B, D, T / hop]`."""
        ...

    def decode(self, latents: Tensor) -> Tensor:
        """Decode `[B, D, Z]` to `[B, C, Z * hop]`, or a few samples fewer."""
        ...


class StatefulNetwork(Network, Protocol):
    """A causal network that encodes an item chunk after chunk."""

    def encode_step(
        self, audio: Tensor, states: Sequence[State | None]
    ) -> tuple[Tensor, list[State]]:
        """Encode the next chunks; see `StatefulAutoencoder`."""
        ...


class NetworkLoader(Protocol):
    """Builds a family's network on a device. It is pickled and compared, as part of a handle."""

    def __call__(
        self, name: str, files: ModelFiles, device: torch.device, **options: Value
    ) -> Network:
        """Load the files.

        Raises:
            ModelError: The files do not fit the network.
        """
        ...


@dataclass(frozen=True)
class CodecHandle:
    """A model whose files are found and hashed; `loader` builds its network with `options`."""

    spec: ModelSpec
    files: ModelFiles
    loader: NetworkLoader
    options: Mapping[str, Value] = field(default_factory=dict)

    def load(self, device: str) -> Codec:
        name = self.spec.name
        chosen = check_device(name, device)
        files = find_again(name, self.files)
        return Codec(self.spec, self.loader(name, files, chosen, **self.options), chosen)


def codec_spec(
    name: str,
    *,
    sample_rate: int,
    channels: int,
    latent_channels: int,
    hop: int,
    context: Context | None,
    chunk_frames: int | None = None,
    overlap_frames: int | None = None,
    batch_size: Mapping[str, int] | None = None,
    own_length: bool = False,
    codebook_size: int | None = None,
    overhang: int = 0,
    min_samples: int | None = None,
    step_frames: int = 0,
) -> ModelSpec:
    """The values of a family's spec that follow from a model's configuration.

    By default a chunk has 10 s and the overlap is twice the context. `own_length` means that chunks
    of any length are encoded, so the last one is not padded. The default of models with
    `step_frames` is `stitch: state`.
    """
    reach = 0 if context is None else context.left
    blend: Stitch = "crossfade" if codebook_size is None else "none"
    return ModelSpec(
        name=name,
        sample_rate=sample_rate,
        channels=channels,
        latent_channels=latent_channels,
        hop=hop,
        overhang=overhang,
        sample_multiple=1 if own_length else hop,
        min_samples=min_samples or hop,
        context=context,
        stitch=blend if context is None else "state" if step_frames else "trim",
        chunk_frames=chunk_frames or max(4 * reach, round(CHUNK_SECONDS * sample_rate / hop)),
        overlap_frames=2 * reach if overlap_frames is None else overlap_frames,
        batch_size=batch_size or {"cpu": 1, "cuda": 16},
        scale_factor=1.0,
        stochastic_decoder=False,
        codebook_size=codebook_size,
        short_last_chunk=own_length,
        step_frames=step_frames,
    )


@dataclass(frozen=True)
class FoundCodec:
    """A model that was found, and the package that implements it.

    Attributes:
        name: The family and the repository, for messages.
        files: The model's files.
        config: Its configuration.
        package: Name of the package.
        version: Version of the package.
    """

    name: str
    files: ModelFiles
    config: Any
    package: str
    version: str


def make_handle(
    found: FoundCodec,
    spec_of: Callable[[Any], ModelSpec],
    loader: NetworkLoader,
    *,
    scale_factor: float,
    encoding: Mapping[str, Value] | None = None,
    decoding: Mapping[str, Value] | None = None,
) -> CodecHandle:
    """Make the handle of a model.

    Args:
        found: The model.
        spec_of: Reads the configuration; see `codec_spec`.
        loader: Builds the network, with both kinds of options.
        scale_factor: As in `ModelSpec`.
        encoding: Options that change the latents, for the identity.
        decoding: Options that change only what is decoded, for the provenance.

    Raises:
        ModelError: The configuration does not fit the family.
    """
    files, encoding, decoding = found.files, encoding or {}, decoding or {}
    package = {"package": found.package, "package_version": found.version}
    try:
        spec = replace(
            spec_of(found.config),
            scale_factor=scale_factor,
            identity={**package, **encoding, **files.identity},
            provenance={**files.provenance, **decoding},
        )
    except LOAD_ERRORS as error:
        raise does_not_load(found.name, files.paths["config"], error) from error
    return CodecHandle(spec, files, loader, {**encoding, **decoding})


class Codec:
    """A network on one device; implements the protocol `Autoencoder`."""

    def __init__(self, spec: ModelSpec, network: Network, device: torch.device) -> None:
        self.spec = spec
        self._network = network
        self._device = device

    @no_gradients
    def encode(self, audio: Tensor) -> Tensor:
        check_audio(self.spec, audio)
        latents = self._network.encode(audio.to(self._device))
        return latents.float() * self.spec.scale_factor

    @no_gradients
    def encode_step(
        self, audio: Tensor, states: Sequence[State | None]
    ) -> tuple[Tensor, list[State]]:
        check_audio(self.spec, audio)
        network = cast(StatefulNetwork, self._network)  # by `spec.step_frames`
        latents, after = network.encode_step(audio.to(self._device), states)
        return latents.float() * self.spec.scale_factor, after

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

        A decoder with odd strides returns a few samples fewer than `spec.samples`; zeros replace
        the missing ones.
        """
        del seed
        check_latents(self.spec, latents, num_samples, positions)
        wave = self._network.decode(latents.to(self._device) / self.spec.scale_factor).float()
        missing = num_samples - wave.shape[-1]
        return F.pad(wave, (0, missing)) if missing > 0 else wave[..., :num_samples]


def check_scale_factor(name: str, scale_factor: float) -> float:
    """Raise `ModelError` unless a scale factor is positive and finite."""
    if not (math.isfinite(scale_factor) and scale_factor > 0):
        raise ModelError(f"Model {name}: option scale_factor must be positive, not {scale_factor}.")
    return float(scale_factor)


def dac_encoder_context(strides: Sequence[int]) -> int:
    """Number of latent frames on each side that a frame of a DAC or Oobleck encoder depends on.

    R. Kumar and others, "High-Fidelity Audio Compression with Improved RVQGAN", NeurIPS 2023: a
    convolution with 7 taps; for each stride s, at its sample rate, three residual units (7 taps,
    dilated by 1, 3 and 9) and a convolution with 2 s taps, which extends ceil(s / 2) beyond its
    frame; last a convolution with 3 taps. The result for the published strides is 8.
    """
    reach, rate = 3, 1  # input samples; samples per step at this depth
    for stride in strides:
        reach += rate * (3 * (1 + 3 + 9) + math.ceil(stride / 2))
        rate *= stride
    return math.ceil((reach + rate) / rate)
