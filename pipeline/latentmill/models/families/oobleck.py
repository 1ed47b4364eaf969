"""The model `oobleck:REPO`: the autoencoder of Stable Audio Open, as diffusers has it.

Z. Evans and others, "Stable Audio Open", arXiv 2407.14358. A VAE: the mean of the posterior is
stored, with its standard deviation where that is asked for, since sampling is the reader's
business.
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
        """The posterior's mean, and its standard deviation below it if that is wanted.

        They are the halves of the encoder's channels, as in `OobleckDiagonalGaussianDistribution`.
        """
        mean: Tensor
        mean, scale = self._model.encoder(audio).chunk(2, dim=1)
        return torch.cat((mean, F.softplus(scale.float()) + 1e-4), dim=1) if self._std else mean

    def decode(self, latents: Tensor) -> Tensor:
        """The decoder's output for the mean."""
        if self._std:
            latents = latents.chunk(2, dim=1)[0]
        audio: Tensor = self._model.decoder(latents)
        return audio


def load(name: str, files: ModelFiles, device: torch.device, **options: Value) -> OobleckNetwork:
    """Build the network from its configuration and its state dict; see `Loader`.

    The option `posterior` is `build`'s.
    """
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
    """Find the model's files and make its handle.

    Args:
        repo: Hub repository, local folder, or local weights file beside its `config.json`.
        revision: Branch, tag or commit of a hub repository.
        subfolder: Where in it the autoencoder is; None: `vae` where there is one, else the root.
        scale_factor: What latents are multiplied by, mean and standard deviation alike.
        posterior: `mean`, or `mean+std`: a latent `[2 * D, Z]` with D rows of means, then D rows
            of standard deviations, which decoding leaves out.

    Raises:
        ModelError: The package or the weights are missing, or they are another model's.
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
