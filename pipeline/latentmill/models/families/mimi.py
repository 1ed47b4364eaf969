"""The model `mimi:REPO`: Kyutai's Mimi as implemented in transformers.

A. Défossez and others, "Moshi: a speech-text foundation model for real-time dialogue", arXiv
2410.00037. The latents are those before quantisation; in half of its training Mimi decoded latents
without the quantiser, so its decoder works on them.

Its convolutions are causal, and each layer of a transformer after them attends to the last 250
steps (10 s): the influence of earlier audio on a frame decays with distance, but ends only after
minutes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import Tensor

from latentmill.models.base import Context, ModelSpec
from latentmill.models.families.codec import codec_spec
from latentmill.models.families.streaming import PADDING_MODES, transformer_step
from latentmill.models.families.transformers_codec import (
    CodecFamily,
    as_indices,
    build_codec,
    check_causal,
)

if TYPE_CHECKING:
    from latentmill.models.base import State

CONTEXT_SECONDS = 10.0  # relative error 3e-6 in docs/models.md (random weights)
CHUNK_SECONDS = 60.0  # a sixth of it is context


class MimiNetwork:
    """The `MimiModel` of transformers as a `QuantisingNetwork`."""

    def __init__(self, model: Any) -> None:
        self._model = model

    def encode(self, audio: Tensor) -> Tensor:
        """Run encoder, transformer and downsampling."""
        latents: Tensor = self._model.encoder(audio, use_streaming=False).latents
        return latents

    def encode_step(
        self, audio: Tensor, states: Sequence[State | None]
    ) -> tuple[Tensor, list[State]]:
        return transformer_step(self._model.encoder, audio, states)

    def decode(self, latents: Tensor) -> Tensor:
        """Run upsampling, transformer and decoder."""
        audio: Tensor = self._model.decoder(latents).audio_values
        return audio

    def quantise(self, latents: Tensor) -> Tensor:
        """Quantise with all codebooks; the first one is the semantic codebook."""
        codes: Tensor = self._model.quantizer.encode(latents)  # [codebooks, B, Z]
        return codes.transpose(0, 1).float()

    def dequantise(self, codes: Tensor) -> Tensor:
        indices = as_indices(codes, self._model.config.codebook_size)
        latents: Tensor = self._model.quantizer.decode(indices)
        return latents


def _spec(config: Any, codes: bool) -> ModelSpec:
    check_causal("mimi", config)
    rate = config.sampling_rate
    hop = math.prod(config.upsampling_ratios) * config.latent_stride
    reach = math.ceil(CONTEXT_SECONDS * rate / hop)
    return codec_spec(
        "mimi",
        sample_rate=rate,
        channels=config.audio_channels,
        latent_channels=config.num_quantizers if codes else config.hidden_size,
        hop=hop,
        context=Context(reach, 0),
        chunk_frames=round(CHUNK_SECONDS * rate / hop),
        overlap_frames=reach,
        batch_size={"cpu": 1, "cuda": 8},
        codebook_size=config.codebook_size if codes else None,
        step_frames=int(config.pad_mode in PADDING_MODES[:2]),
    )


build = partial(build_codec, CodecFamily("mimi", MimiNetwork, _spec))
