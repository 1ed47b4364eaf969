"""The model `dac:REPO`: the Descript Audio Codec as implemented in transformers.

R. Kumar and others, "High-Fidelity Audio Compression with Improved RVQGAN", NeurIPS 2023. The
latents are the encoder's output before quantisation. They have 1024 channels for the published
models; in 16 bits this is twice the size of the audio.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

from torch import Tensor

from latentmill.models.base import Context, ModelSpec
from latentmill.models.families.codec import codec_spec, dac_encoder_context
from latentmill.models.families.transformers_codec import CodecFamily, as_indices, build_codec


class DacNetwork:
    """The `DacModel` of transformers as a `QuantisingNetwork`."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def encode(self, audio: Tensor) -> Tensor:
        latents: Tensor = self.model.encoder(audio)
        return latents

    def decode(self, latents: Tensor) -> Tensor:
        audio: Tensor = self.model.decoder(latents)
        return audio

    def quantise(self, latents: Tensor) -> Tensor:
        codes: Tensor = self.model.quantizer(latents)[1]
        return codes.float()

    def dequantise(self, codes: Tensor) -> Tensor:
        indices = as_indices(codes, self.model.config.codebook_size)
        latents: Tensor = self.model.quantizer.from_codes(indices)[0]
        return latents


def _spec(config: Any, codes: bool) -> ModelSpec:
    reach = dac_encoder_context(config.downsampling_ratios)
    return codec_spec(
        "dac",
        sample_rate=config.sampling_rate,
        channels=1,
        latent_channels=config.n_codebooks if codes else config.hidden_size,
        hop=math.prod(config.downsampling_ratios),
        context=Context(reach, reach),
        codebook_size=config.codebook_size if codes else None,
    )


build = partial(build_codec, CodecFamily("dac", DacNetwork, _spec))
