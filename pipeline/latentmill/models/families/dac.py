"""The model `dac:REPO`: the Descript Audio Codec as implemented in transformers.

R. Kumar and others, "High-Fidelity Audio Compression with Improved RVQGAN", NeurIPS 2023. The
latents are the encoder's output before quantisation. They have 1024 channels for the published
models; in 16 bits this is twice the size of the audio.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor

from latentmill.models.base import Context, Value
from latentmill.models.families.codec import (
    Network,
    as_indices,
    dac_encoder_context,
    with_quantiser,
)
from latentmill.models.families.transformers_codec import (
    CodecShape,
    Family,
    build_codec,
    load_model,
)
from latentmill.models.weights import ModelFiles

CHUNK_SECONDS = 10.0


class DacNetwork:
    """The `DacModel` of transformers as a `QuantisingNetwork`."""

    def __init__(self, model: Any) -> None:
        self._model = model

    def encode(self, audio: Tensor) -> Tensor:
        latents: Tensor = self._model.encoder(audio)
        return latents

    def decode(self, latents: Tensor) -> Tensor:
        audio: Tensor = self._model.decoder(latents)
        return audio

    def quantise(self, latents: Tensor) -> Tensor:
        codes: Tensor = self._model.quantizer(latents)[1]
        return codes.float()

    def dequantise(self, codes: Tensor) -> Tensor:
        indices = as_indices(codes, self._model.config.codebook_size)
        latents: Tensor = self._model.quantizer.from_codes(indices)[0]
        return latents


def load(name: str, files: ModelFiles, device: torch.device, **options: Value) -> Network:
    """Build the network; see `Loader`. The options are those of `with_quantiser`."""
    return with_quantiser(DacNetwork(load_model(name, "dac", files, device)), **options)


def _shape(config: Any, codes: bool) -> CodecShape:
    reach = dac_encoder_context(config.downsampling_ratios)
    hop, rate = math.prod(config.downsampling_ratios), config.sampling_rate
    return CodecShape(
        sample_rate=rate,
        channels=1,
        latent_channels=config.n_codebooks if codes else config.hidden_size,
        hop=hop,
        context=Context(reach, reach),
        chunk_frames=max(4 * reach, round(CHUNK_SECONDS * rate / hop)),
        overlap_frames=2 * reach,
        batch_size={"cpu": 1, "cuda": 16},
    )


build = partial(build_codec, Family("dac", load, _shape))
