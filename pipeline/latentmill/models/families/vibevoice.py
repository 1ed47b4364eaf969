"""The model `vibevoice:REPO`: the acoustic tokenizer of Microsoft's VibeVoice, as in transformers.

Z. Peng and others, "VibeVoice Technical Report", arXiv 2508.19205. The encoder is a stack of causal
convolutions, most of them at the latent frame rate, so a frame depends on 58 earlier ones. The
package's `encode` adds noise by default, of a random standard deviation for each element of the
batch; the latents here are without it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import Tensor

from latentmill.models.base import Context, ModelSpec
from latentmill.models.families.codec import codec_spec
from latentmill.models.families.streaming import Steps
from latentmill.models.families.transformers_codec import ContinuousFamily, build_continuous

if TYPE_CHECKING:
    from latentmill.models.base import State

SAMPLE_RATE = 24_000  # the configuration does not have it
CHUNK_SECONDS = 30.0  # a quarter of it is context


class VibeVoiceNetwork:
    """The `VibeVoiceAcousticTokenizerModel` of transformers as a `Network`."""

    def __init__(self, model: Any) -> None:
        self._model = model

    def encode(self, audio: Tensor) -> Tensor:
        latents: Tensor = self._model.encode(audio, sample=False).latents  # [B, Z, D]
        return latents.transpose(1, 2)

    def encode_step(
        self, audio: Tensor, states: Sequence[State | None]
    ) -> tuple[Tensor, list[State]]:
        steps = Steps(states)
        encoded = self._model.encode(audio, padding_cache=_VibeVoicePadding(steps), sample=False)
        latents: Tensor = encoded.latents
        return latents.transpose(1, 2), steps.after()

    def decode(self, latents: Tensor) -> Tensor:
        audio: Tensor = self._model.decode(latents.transpose(1, 2)).audio
        return audio


class _VibeVoicePadding:
    """Padding cache of the convolutions."""

    def __init__(self, steps: Steps) -> None:
        self._steps = steps

    def update(self, hidden: Tensor, cache_key: str, convolution: Any) -> Tensor:
        del cache_key
        return self._steps.padded(hidden, convolution.left_pad, "constant")


def _spec(config: Any) -> ModelSpec:
    hop, reach = config.hop_length, encoder_context(config)
    return codec_spec(
        "vibevoice",
        sample_rate=SAMPLE_RATE,
        channels=config.channels,
        latent_channels=config.hidden_size,
        hop=hop,
        context=Context(reach, 0),
        chunk_frames=max(2 * reach, round(CHUNK_SECONDS * SAMPLE_RATE / hop)),
        overlap_frames=reach,
        batch_size={"cpu": 1, "cuda": 8},
        step_frames=1,
    )


def encoder_context(config: Any) -> int:
    """Number of earlier latent frames that a frame depends on; 58 for the published model.

    A convolution with stride s has 2 s taps and so extends s steps beyond its frame.
    """
    taps: int = config.kernel_size - 1
    reach = taps * (1 + config.depths[0])  # input samples
    rate = 1  # samples per step at this depth
    for stride, depth in zip(config.downsampling_ratios, config.depths[1:], strict=True):
        reach += rate * stride
        rate *= stride
        reach += rate * taps * depth
    reach += rate * taps
    frames: int = math.ceil(reach / rate)
    return frames


build = partial(
    build_continuous,
    ContinuousFamily("vibevoice", "vibevoice_acoustic_tokenizer", VibeVoiceNetwork, _spec),
)
