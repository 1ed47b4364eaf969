"""The model `oobleck:REPO`: the autoencoder of Stable Audio Open as implemented in diffusers.

Z. Evans and others, "Stable Audio Open", arXiv 2407.14358. It is a VAE: the mean of the posterior
is stored, and its standard deviation with `posterior=mean+std`. Samples are drawn when the latents
are read.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from latentmill.models.base import Context, ModelSpec, Value
from latentmill.models.families.codec import CodecHandle, check_scale_factor, dac_encoder_context
from latentmill.models.families.diffusers_codec import find_autoencoder, load_autoencoder
from latentmill.models.weights import LOAD_ERRORS, ModelFiles, does_not_load

CHUNK_SECONDS = 10.0
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
    """Build the network from its configuration and its state dict; see `Loader`."""
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
    files, config, version = find_autoencoder(name, CLASS, repo, revision, subfolder)
    try:
        spec = _spec(config, scale, posterior, files, version)
    except LOAD_ERRORS as error:
        raise does_not_load(name, files.paths["config"], error) from error
    return CodecHandle(spec, files, load, {"posterior": posterior})


def _spec(
    config: dict[str, Any], scale: float, posterior: Posterior, files: ModelFiles, version: str
) -> ModelSpec:
    strides: list[int] = config["downsampling_ratios"]
    hop = math.prod(strides)
    context = dac_encoder_context(strides)
    return ModelSpec(
        name="oobleck",
        sample_rate=config["sampling_rate"],
        channels=config["audio_channels"],
        latent_channels=config["decoder_input_channels"] * (2 if posterior == "mean+std" else 1),
        hop=hop,
        overhang=0,
        sample_multiple=hop,
        min_samples=hop,
        context=Context(context, context),
        stitch="trim",
        chunk_frames=max(4 * context, round(CHUNK_SECONDS * config["sampling_rate"] / hop)),
        overlap_frames=2 * context,
        batch_size={"cpu": 1, "cuda": 16},
        scale_factor=scale,
        stochastic_decoder=False,
        identity={
            "package": "diffusers",
            "package_version": version,
            "posterior": posterior,
            **files.identity,
        },
        provenance=files.provenance,
    )
