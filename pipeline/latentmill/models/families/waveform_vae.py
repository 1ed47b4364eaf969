"""The models `kvae:REPO`, `minimax:REPO` and `longcat:REPO`: VAEs of diffusers on mono waveforms.

KVAE-Audio (Kandinsky Lab), the audio VAE of MiniMax-H3 and the VAE of LongCat-AudioDiT (Meituan).
All have the encoder of DAC (`dac_encoder_context`). The mean of the posterior is stored, and its
standard deviation with `posterior=mean+std`.

KVAE and MiniMax have attention after the convolutions, without positions and without a limit: over
all frames in KVAE, over all earlier ones in MiniMax. No context is enough for them, so their chunks
are crossfaded. LongCat is convolutional and is trimmed.

The pipeline of MiniMax normalises latents with a mean and a standard deviation per channel, which
are in the model's configuration, and LongCat's class divides latents by its `scale`. The stored
latents are normalised in the same way.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from latentmill.models.base import Context, ModelSpec, Value
from latentmill.models.families.codec import (
    CHUNK_SECONDS,
    CodecHandle,
    check_scale_factor,
    codec_spec,
    dac_encoder_context,
    make_handle,
)
from latentmill.models.families.diffusers_codec import find_autoencoder, load_autoencoder
from latentmill.models.families.posterior import Posterior, mean_of
from latentmill.models.weights import ModelFiles

Config = Mapping[str, Any]

OVERLAP = 0.25  # share of a chunk, for models with attention over the whole chunk


class VaeNetwork:
    """A VAE with normalised latents: `(mean - shift) / width`."""

    def __init__(self, model: Any, moments: Moments, shift: Any, width: Any, std: bool) -> None:
        self._model = model
        self._moments = moments
        self._shift = shift
        self._width = width
        self._std = std

    def encode(self, audio: Tensor) -> Tensor:
        """Return the posterior's mean and, if wanted, its standard deviation in the rows below."""
        mean, std = self._moments(self._model, audio)
        mean = (mean - self._shift) / self._width
        return torch.cat((mean, std / self._width), dim=1) if self._std else mean

    def decode(self, latents: Tensor) -> Tensor:
        """Decode the mean."""
        mean = mean_of(latents, self._std)
        audio: Tensor = self._model.decode(mean * self._width + self._shift).sample
        return audio


Moments = Callable[[Any, Tensor], tuple[Tensor, Tensor]]


def posterior_moments(model: Any, audio: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the posterior that `encode` returns."""
    posterior = model.encode(audio).latent_dist
    return posterior.mean, posterior.std


def longcat_moments(model: Any, audio: Tensor) -> tuple[Tensor, Tensor]:
    """Both halves of the encoder's output; the class's `encode` returns a sample or the mean."""
    mean, raw = model.encoder(audio).chunk(2, dim=1)
    std = F.softplus(raw.float()) + 1e-4
    return mean / model.config.scale, std / model.config.scale  # `decode` multiplies by it


def channel_scaling(config: Config) -> tuple[Any, Any]:
    """Mean and standard deviation of each channel; none if a model has not been measured."""
    values = (config["latents_mean"], config["latents_std"])
    if values == (None, None):
        return 0.0, 1.0
    if any(len(each or ()) != config["latent_channels"] for each in values):
        raise ValueError("latents_mean and latents_std need one number per latent channel")
    shift, width = (torch.tensor(each).view(1, -1, 1) for each in values)
    return shift, width


@dataclass(frozen=True)
class VaeFamily:
    """A VAE class of diffusers, and the `NetworkLoader` of its networks.

    Attributes:
        name: The family's name.
        class_name: Name of the class in diffusers.
        folder: The VAE's folder in the repository of its authors.
        spec_of: Reads a configuration.
        moments: Encodes audio to the posterior's mean and standard deviation.
        scaling: Reads shift and width of the latents from a configuration.
    """

    name: str
    class_name: str
    folder: str
    spec_of: Callable[[Config], ModelSpec]
    moments: Moments
    scaling: Callable[[Config], tuple[Any, Any]]

    def __call__(
        self, name: str, files: ModelFiles, device: torch.device, **options: Value
    ) -> VaeNetwork:
        model = load_autoencoder(name, self.class_name, files, device)
        shift, width = (
            each.to(device) if isinstance(each, Tensor) else each
            for each in self.scaling(model.config)
        )
        return VaeNetwork(model, self.moments, shift, width, options["posterior"] == "mean+std")


def build(
    family: VaeFamily,
    repo: str,
    *,
    revision: str | None = None,
    subfolder: str | None = None,
    scale_factor: float = 1.0,
    posterior: Posterior = "mean",
) -> CodecHandle:
    """Find the model's files and make its handle; docs/models.md describes the options."""
    name = f"{family.name}:{repo}"
    scale = check_scale_factor(name, scale_factor)

    def spec_of(config: Config) -> ModelSpec:
        family.scaling(config)  # raises if it does not fit
        spec = family.spec_of(config)
        rows = spec.latent_channels * (2 if posterior == "mean+std" else 1)
        return replace(spec, latent_channels=rows)

    found = find_autoencoder(name, family.class_name, repo, revision, subfolder, family.folder)
    return make_handle(
        found, spec_of, family, scale_factor=scale, encoding={"posterior": posterior}
    )


def attention_spec(
    name: str, sample_rate: int, channels: int, latent_channels: int, strides: Sequence[int]
) -> ModelSpec:
    hop = math.prod(strides)
    chunk_frames = round(CHUNK_SECONDS * sample_rate / hop)
    return codec_spec(
        name,
        sample_rate=sample_rate,
        channels=channels,
        latent_channels=latent_channels,
        hop=hop,
        context=None,
        chunk_frames=chunk_frames,
        overlap_frames=round(OVERLAP * chunk_frames),
    )


def _kvae_spec(config: Config) -> ModelSpec:
    rate, channels = config["sample_rate"], config["num_channels"]
    return attention_spec("kvae", rate, channels, config["codebook_dim"], config["encoder_rates"])


def _minimax_spec(config: Config) -> ModelSpec:
    rate, rows = config["sampling_rate"], config["latent_channels"]
    return attention_spec("minimax", rate, 1, rows, config["encoder_rates"])


def _longcat_spec(config: Config) -> ModelSpec:
    """The strides give the hop: the class ignores `downsampling_ratio`.

    As in the class, the last stride counts for all levels that have none of their own.
    """
    levels = len(config["c_mults"] or (1, 2, 4, 8, 16))
    strides = list(config["strides"] or [2])
    strides = (strides + strides[-1:] * levels)[:levels]
    reach = dac_encoder_context(strides)
    return codec_spec(
        "longcat",
        sample_rate=config["sample_rate"],
        channels=config["in_channels"],
        latent_channels=config["latent_dim"],
        hop=math.prod(strides),
        context=Context(reach, reach),
    )


def _no_scaling(config: Config) -> tuple[Any, Any]:
    return 0.0, 1.0


KVAE = VaeFamily(
    "kvae",
    "AutoencoderKLKVAEAudio",
    "diffusers",
    _kvae_spec,
    posterior_moments,
    _no_scaling,
)
MINIMAX = VaeFamily(
    "minimax",
    "AutoencoderKLMiniMaxH3Audio",
    "audio_vae",
    _minimax_spec,
    posterior_moments,
    channel_scaling,
)
LONGCAT = VaeFamily(
    "longcat",
    "LongCatAudioDiTVae",
    "vae",
    _longcat_spec,
    longcat_moments,
    _no_scaling,
)

build_kvae = partial(build, KVAE)
build_minimax = partial(build, MINIMAX)
build_longcat = partial(build, LONGCAT)
