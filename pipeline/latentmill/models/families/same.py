"""The model `same:REPO`: the autoencoder of Stable Audio 3 as implemented in diffusers.

Stability AI, "Stable Audio 3", arXiv 2605.17991: the Semantically-Aligned Music Encoder. Patches of
samples are encoded by transformers. In each layer a token attends to a fixed number of latent
frames on both sides, so a frame's context is finite; positions are relative.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from latentmill.models.base import Context, ModelSpec, Value
from latentmill.models.families.codec import (
    CodecHandle,
    check_scale_factor,
    codec_spec,
    make_handle,
)
from latentmill.models.families.diffusers_codec import find_autoencoder, load_autoencoder
from latentmill.models.families.stable_audio import SAME
from latentmill.models.weights import ModelFiles

CLASS = "AutoencoderSAME"


class SameNetwork:
    """The `AutoencoderSAME` of diffusers as a `Network`."""

    def __init__(self, model: Any) -> None:
        self._model = model

    def encode(self, audio: Tensor) -> Tensor:
        """Encode to the normalised latents that the diffusion model is trained on."""
        latents: Tensor = self._model.encode(audio).latents
        return latents

    def decode(self, latents: Tensor) -> Tensor:
        audio: Tensor = self._model.decode(latents).sample
        return audio


def load(name: str, files: ModelFiles, device: torch.device, **options: Value) -> SameNetwork:
    """Build the network; see `NetworkLoader`. There are no options."""
    return SameNetwork(load_autoencoder(name, CLASS, files, device, SAME))


def build(
    repo: str,
    *,
    revision: str | None = None,
    subfolder: str | None = None,
    scale_factor: float = 1.0,
) -> CodecHandle:
    """Find the model's files and make its handle; docs/models.md describes the options."""
    name = f"same:{repo}"
    scale = check_scale_factor(name, scale_factor)
    found = find_autoencoder(name, CLASS, repo, revision, subfolder, own=SAME)
    return make_handle(found, _spec, load, scale_factor=scale)


def encoder_context(strides: Sequence[int], depths: Sequence[int], window: int) -> int:
    """Number of latent frames on each side that a frame depends on.

    In each layer a token attends to `window` segments on each side; the segments of one level are
    the steps of the next, slower level.
    """
    reach = 0.0  # in steps of the level
    for stride, depth in zip(strides, depths, strict=True):
        reach = reach / stride + depth * window
    return math.ceil(reach)


def _spec(config: Mapping[str, Any]) -> ModelSpec:
    """Read a configuration. Longer chunks would need memory for the square of their length."""
    strides = config["encoder_strides"]
    reach = encoder_context(strides, config["encoder_transformer_depths"], config["sliding_window"])
    return codec_spec(
        "same",
        sample_rate=config["sampling_rate"],
        channels=config["audio_channels"],
        latent_channels=config["latent_dim"],
        hop=config["patch_size"] * math.prod(strides),
        context=Context(reach, reach),
    )
