"""The model `cosmos:REPO`: the audio tokenizer of Cosmos 3 as implemented in diffusers.

Its encoder is a short STFT and ConvNeXt blocks, its decoder that of Oobleck. The class's `encode`
divides the audio by the maximum of the whole batch first, so that latents would depend on their
neighbours in a batch and on the chunk. Here audio is encoded at its own level.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from latentmill.errors import ModelError
from latentmill.models.base import Context, ModelSpec, Value
from latentmill.models.families.codec import (
    CodecHandle,
    check_scale_factor,
    codec_spec,
    make_handle,
)
from latentmill.models.families.diffusers_codec import find_autoencoder, load_autoencoder
from latentmill.models.families.posterior import Posterior, mean_of, softplus_posterior
from latentmill.models.weights import ModelFiles

CLASS = "Cosmos3AVAEAudioTokenizer"


class CosmosNetwork:
    """`Cosmos3AVAEAudioTokenizer` without its normalisation of the batch."""

    def __init__(self, model: Any, std: bool) -> None:
        self._model = model
        self._std = std

    def encode(self, audio: Tensor) -> Tensor:
        return softplus_posterior(self._model.encoder(audio).transpose(1, 2), self._std)

    def decode(self, latents: Tensor) -> Tensor:
        audio: Tensor = self._model.decode(mean_of(latents, self._std))
        return audio


def load(name: str, files: ModelFiles, device: torch.device, **options: Value) -> CosmosNetwork:
    """Build the network from its configuration and its state dict; see `NetworkLoader`."""
    model = load_autoencoder(name, CLASS, files, device)
    return CosmosNetwork(model, std=options["posterior"] == "mean+std")


def build(
    repo: str,
    *,
    revision: str | None = None,
    subfolder: str | None = None,
    scale_factor: float = 1.0,
    posterior: Posterior = "mean",
) -> CodecHandle:
    """Find the model's files and make its handle; docs/models.md describes the options."""
    name = f"cosmos:{repo}"
    scale = check_scale_factor(name, scale_factor)
    found = find_autoencoder(name, CLASS, repo, revision, subfolder, default="sound_tokenizer")
    if not found.config.get("encoder_enabled", True):
        raise ModelError(
            f"Model {name}: this checkpoint has no encoder (encoder_enabled is false in its "
            "config.json); use one that was converted with its encoder."
        )
    return make_handle(
        found,
        partial(_spec, std=posterior == "mean+std"),
        load,
        scale_factor=scale,
        encoding={"posterior": posterior},
    )


def encoder_context(n_fft: int, hop: int, strides: Sequence[int], blocks: int) -> int:
    """Number of latent frames on each side that a frame depends on.

    Half of what an STFT window extends beyond its hop; for each stride s, at its rate, `blocks`
    convolutions with 7 taps and one with 2 s taps, which extends ceil(s / 2) beyond its frame.
    """
    reach, rate = math.ceil((n_fft - hop) / 2), hop
    for stride in strides:
        reach += rate * (3 * blocks + math.ceil(stride / 2))
        rate *= stride
    return math.ceil(reach / rate)


def _spec(config: dict[str, Any], *, std: bool) -> ModelSpec:
    strides, fft_hop = config["enc_strides"], config["enc_hop_length"]
    hop = fft_hop * math.prod(strides)
    if hop != math.prod(config["dec_strides"]):
        raise ValueError("the strides of its encoder and its decoder differ")
    reach = encoder_context(config["enc_n_fft"], fft_hop, strides, config["enc_num_blocks"])
    return codec_spec(
        "cosmos",
        sample_rate=config["sampling_rate"],
        channels=config["input_channels"] * (2 if config["stereo"] else 1),
        latent_channels=config["vocoder_input_dim"] * (2 if std else 1),
        hop=hop,
        context=Context(reach, reach),
    )
