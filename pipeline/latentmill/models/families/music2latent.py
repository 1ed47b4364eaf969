"""The model `music2latent` of the package music2latent. Code and weights: CC BY-NC 4.0.

M. Pasini and others, "Music2Latent: Consistency Autoencoders for Latent Audio Compression", ISMIR
2024. linear-cae is derived from it and has the same architecture, so the same code runs both.

The package's `EncoderDecoder` is not used, because it downloads into its own installation and
unpickles the file. Its modules are called instead, in the same order. The package truncates audio
to whole latent frames; here the last, partial frame is kept, as in linear-cae. On a GPU the package
encodes in half precision; here the caller's autocast region decides.
"""

from __future__ import annotations

import importlib
from types import SimpleNamespace

import torch

from latentmill.models.families.codec import check_scale_factor
from latentmill.models.families.linear_cae.model import (
    LinearCaeHandle,
    check_diffusion_steps,
    consistency_spec,
)
from latentmill.models.weights import (
    LOAD_ERRORS,
    ModelFiles,
    does_not_load,
    find,
    import_package,
    parse_repo,
    read_state,
)

NAME = "music2latent"
REPO = "SonyCSLParis/music2latent"
FILE = "music2latent.pt"
ENTRY = "gen_state_dict"
SCALE_FACTOR = 1 / 0.06  # the package divides by its `sigma_rescale`


def load(name: str, files: ModelFiles, device: torch.device) -> SimpleNamespace:
    """Build the parts of a `LinearCae` from the package's modules and the state dict."""
    import_package(name, "music2latent")
    audio, hparams, models, utils = (
        importlib.import_module(f"music2latent.{module}")
        for module in ("audio", "hparams", "models", "utils")
    )
    path = files.paths["weights"]
    state = read_state(name, path, ENTRY)
    try:
        unet = models.UNet()
        unet.load_state_dict(state)
    except LOAD_ERRORS as error:
        raise does_not_load(name, path, error) from error
    unet = unet.eval().requires_grad_(False).to(device)
    return SimpleNamespace(
        frontend=SimpleNamespace(
            to_representation=audio.to_representation_encoder,
            to_waveform=audio.to_waveform,
        ),
        generator=SimpleNamespace(
            encoder=unet.encoder,
            forward_generator=unet,
            sigma_max=hparams.sigma_max,
            data_channels=hparams.data_channels,
            hop=hparams.hop,
        ),
        diffusion=utils,
    )


def build(
    *,
    repo: str = REPO,
    revision: str | None = None,
    scale_factor: float = SCALE_FACTOR,
    diffusion_steps: int = 1,
) -> LinearCaeHandle:
    """Find the model's file and make its handle; docs/models.md describes the options."""
    check_diffusion_steps(NAME, diffusion_steps)
    scale = check_scale_factor(NAME, scale_factor)
    _, version = import_package(NAME, "music2latent")
    hparams = importlib.import_module("music2latent.hparams")
    files = find(NAME, parse_repo(NAME, repo, revision), {"weights": [FILE]})
    spec = consistency_spec(
        NAME,
        sample_rate=hparams.sample_rate,
        hop_size=hparams.hop,
        frame_length=4 * hparams.hop,
        halvings=hparams.freq_downsample_list.count(0),
        latent_channels=hparams.bottleneck_channels,
        scale_factor=scale,
        identity={"package": "music2latent", "package_version": version, **files.identity},
        provenance={**files.provenance, "diffusion_steps": diffusion_steps},
    )
    return LinearCaeHandle(spec, files, diffusion_steps, load)
