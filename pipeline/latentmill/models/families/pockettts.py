"""The model `pockettts:REPO`: the audio tokenizer of Kyutai's Pocket TTS, as in transformers.

S. Rouard and others, "Continuous Audio Language Models", arXiv 2509.06926. It has the architecture
of Mimi, with a bottleneck of 32 channels in place of the quantiser. Its convolutions are causal,
and each transformer layer attends to the last 250 steps (1.25 s), so a frame depends on a bounded
number of earlier ones.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import Tensor

from latentmill.errors import ModelError
from latentmill.models.base import Context, ModelSpec
from latentmill.models.families.codec import codec_spec
from latentmill.models.families.streaming import PADDING_MODES, transformer_step
from latentmill.models.families.transformers_codec import (
    ContinuousFamily,
    build_continuous,
    check_causal,
)

if TYPE_CHECKING:
    from latentmill.models.base import State

CHUNK_SECONDS = 20.0  # an eighth of it is context


class PocketNetwork:
    """The `PocketTTSAudioTokenizerModel` of transformers as a `Network`."""

    def __init__(self, model: Any) -> None:
        self._model = model

    def encode(self, audio: Tensor) -> Tensor:
        """Run encoder, transformer and downsampling; a configuration may stream by default."""
        latents: Tensor = self._model.encode(audio, use_streaming=False).latents  # [B, Z, D]
        return latents.transpose(1, 2)

    def encode_step(
        self, audio: Tensor, states: Sequence[State | None]
    ) -> tuple[Tensor, list[State]]:
        return transformer_step(self._model.encoder, audio, states)

    def decode(self, latents: Tensor) -> Tensor:
        """Run projection, upsampling, transformer and decoder."""
        if self._model.decoder is None:
            raise ModelError(
                "These weights of Pocket TTS have no decoder (decoder_config is null): decode with "
                "those of the complete tokenizer."
            )
        audio: Tensor = self._model.decode(latents.transpose(1, 2)).audio_values
        return audio


def _spec(config: Any) -> ModelSpec:
    if config.encoder_config is None:
        raise ValueError("the model has no encoder: encoder_config is null")
    if config.latent_stride < 2:
        raise ValueError("latent_stride is 1, for which transformers builds no downsampling")
    check_causal("pockettts", config)
    hop, rate = config.frame_size, config.sampling_rate
    reach = encoder_context(config)
    return codec_spec(
        "pockettts",
        sample_rate=rate,
        channels=config.audio_channels,
        latent_channels=config.latent_dim,
        hop=hop,
        context=Context(reach, 0),
        chunk_frames=max(4 * reach, round(CHUNK_SECONDS * rate / hop)),
        overlap_frames=reach,
        batch_size={"cpu": 1, "cuda": 16},
        step_frames=int(config.pad_mode in PADDING_MODES[:2]),
    )


def encoder_context(config: Any) -> int:
    """Number of earlier latent frames that a frame depends on; 33 for the published model.

    A convolution with stride s has 2 s taps and so extends s steps beyond its frame.
    """
    reach: int = config.kernel_size - 1  # input samples
    rate = 1  # samples per step at this depth
    for ratio in reversed(config.upsampling_ratios):
        for layer in range(config.num_residual_layers):
            reach += rate * (config.residual_kernel_size - 1) * config.dilation_growth_rate**layer
        reach += rate * ratio
        rate *= ratio
    reach += rate * (config.last_kernel_size - 1)
    reach += rate * config.num_hidden_layers * (config.sliding_window - 1)
    hop: int = rate * config.latent_stride
    return math.ceil((reach + hop) / hop)


build = partial(
    build_continuous,
    ContinuousFamily("pockettts", "pocket_tts_audio_tokenizer", PocketNetwork, _spec),
)
