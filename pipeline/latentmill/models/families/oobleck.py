"""The model `oobleck:REPO`: the autoencoder of Stable Audio Open as implemented in diffusers.

Z. Evans and others, "Stable Audio Open", arXiv 2407.14358. It is a VAE: the mean of the posterior
is stored, and its standard deviation with `posterior=mean+std`. Samples are drawn when the latents
are read.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F  # noqa: N812
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
from latentmill.models.weights import ModelFiles

CLASS = "AutoencoderOobleck"

Posterior = Literal["mean", "mean+std"]


class OobleckNetwork:
    """`AutoencoderOobleck` without its tiling."""

    def __init__(self, model: Any, std: bool) -> None:
        self._model = model
        self._std = std

    def encode(self, audio: Tensor) -> Tensor:
        """Return the posterior's mean and, if wanted, its standard deviation in the rows below.

        They are the halves of the encoder's channels, as in `OobleckDiagonalGaussianDistribution`.
        """
        mean: Tensor
        mean, scale = self._model.encoder(audio).chunk(2, dim=1)
        return torch.cat((mean, F.softplus(scale.float()) + 1e-4), dim=1) if self._std else mean

    def decode(self, latents: Tensor) -> Tensor:
        """Decode the mean."""
        if self._std:
            latents = latents.chunk(2, dim=1)[0]
        audio: Tensor = self._model.decoder(latents)
        return audio


def load(name: str, files: ModelFiles, device: torch.device, **options: Value) -> OobleckNetwork:
    """Build the network from its configuration and its state dict; see `NetworkLoader`."""
    model = load_autoencoder(name, CLASS, files, device)
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
        find_autoencoder(name, CLASS, repo, revision, subfolder),
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
