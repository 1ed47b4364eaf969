"""The model `oobleck:REPO`: the autoencoder of Stable Audio Open as implemented in diffusers.

Z. Evans and others, "Stable Audio Open", arXiv 2407.14358. ACE-Step 1.5 has the same class with
other strides and sample rate.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor

from latentmill.models.base import Context, ModelSpec, Value
from latentmill.models.families.codec import (
    CodecHandle,
    check_scale_factor,
    codec_spec,
    dac_encoder_context,
    make_handle,
)
from latentmill.models.families.diffusers_codec import find_autoencoder, load_autoencoder
from latentmill.models.families.posterior import Posterior, mean_of, softplus_posterior
from latentmill.models.families.stable_audio import OOBLECK
from latentmill.models.weights import ModelFiles

CLASS = "AutoencoderOobleck"


class OobleckNetwork:
    """`AutoencoderOobleck` without its tiling."""

    def __init__(self, model: Any, std: bool) -> None:
        self._model = model
        self._std = std

    def encode(self, audio: Tensor) -> Tensor:
        return softplus_posterior(self._model.encoder(audio), self._std)

    def decode(self, latents: Tensor) -> Tensor:
        audio: Tensor = self._model.decoder(mean_of(latents, self._std))
        return audio


def load(name: str, files: ModelFiles, device: torch.device, **options: Value) -> OobleckNetwork:
    """Build the network from its configuration and its state dict; see `NetworkLoader`."""
    model = load_autoencoder(name, CLASS, files, device, OOBLECK)
    return OobleckNetwork(model, std=options["posterior"] == "mean+std")


def build(
    repo: str,
    *,
    revision: str | None = None,
    subfolder: str | None = None,
    scale_factor: float = 1.0,
    posterior: Posterior = "mean",
) -> CodecHandle:
    """Find the model's files and make its handle; docs/models.md describes the options.

    With `posterior` `mean+std` a latent is `[2 * D, Z]`: D rows of means, then D rows of standard
    deviations, which decoding ignores. `scale_factor` multiplies both.
    """
    name = f"oobleck:{repo}"
    scale = check_scale_factor(name, scale_factor)
    return make_handle(
        find_autoencoder(name, CLASS, repo, revision, subfolder, own=OOBLECK),
        partial(_spec, std=posterior == "mean+std"),
        load,
        scale_factor=scale,
        encoding={"posterior": posterior},
    )


def _spec(config: dict[str, Any], *, std: bool) -> ModelSpec:
    strides = config["downsampling_ratios"]
    reach = dac_encoder_context(strides)
    return codec_spec(
        "oobleck",
        sample_rate=config["sampling_rate"],
        channels=config["audio_channels"],
        latent_channels=config["decoder_input_channels"] * (2 if std else 1),
        hop=math.prod(strides),
        context=Context(reach, reach),
    )
