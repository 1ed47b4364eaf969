"""The model `encodec:REPO`: EnCodec, as transformers has it.

A. Défossez and others, "High Fidelity Neural Audio Compression", TMLR 2023. The latents are the
encoder's, before quantisation.

The 24 kHz model is causal, with an LSTM whose memory fades: trimming leaves an error that the
context makes small. The 48 kHz model normalises over its native chunk of one second, by GroupNorm
inside and by the chunk's loudness outside, which the decoder needs: it is stored as one more
latent channel (the last), the same in every frame of a chunk. Its chunks are encoded at their own
length, so that no filling changes the loudness: the codec fills up the last hop by reflection.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from latentmill.models.base import Context, Value
from latentmill.models.families.codec import Network, as_indices, with_quantiser
from latentmill.models.families.transformers_codec import (
    CodecShape,
    Family,
    build_codec,
    load_model,
)
from latentmill.models.weights import ModelFiles

CONTEXT = 48  # 9 for the convolutions; for 1e-5 of the latents' norm (random weights)
CHUNK_SECONDS = 10.0
# Frames that native chunks share, nearest to the codec's 1.5 of 150: as many as the windows of
# decoding share, so that these are the chunks and each has one loudness.
NATIVE_OVERLAP = 4


class EncodecNetwork:
    """`EncodecModel`; see `QuantisingNetwork`. The loudness is in the last row throughout."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._normalise: bool = model.config.normalize

    def encode(self, audio: Tensor) -> Tensor:
        """The encoder's output; where the model normalises, followed by the loudness."""
        if not self._normalise:
            latents: Tensor = self._model.encoder(audio)
            return latents
        mono = audio.mean(dim=1, keepdim=True)
        loudness = mono.square().mean(dim=-1, keepdim=True).sqrt() + 1e-8  # [B, 1, 1]
        latents = self._model.encoder(audio / loudness)
        return torch.cat((latents, loudness.expand(-1, 1, latents.shape[-1])), dim=1)

    def decode(self, latents: Tensor) -> Tensor:
        """The decoder's output, at the loudness of the last channel where there is one."""
        inner = latents[:, :-1] if self._normalise else latents
        audio: Tensor = self._model.decoder(inner)
        if self._normalise:
            audio = audio * F.interpolate(latents[:, -1:], size=audio.shape[-1], mode="linear")
        return audio

    def quantise(self, latents: Tensor) -> Tensor:
        """Codes of all codebooks: those of the highest bandwidth."""
        inner, loudness = latents.tensor_split([self._model.config.hidden_size], dim=1)
        codes: Tensor = self._model.quantizer.encode(inner)  # [codebooks, B, Z]
        return torch.cat((codes.transpose(0, 1).float(), loudness), dim=1)

    def dequantise(self, codes: Tensor) -> Tensor:
        """The sum of the codebooks' entries."""
        inner, loudness = codes.tensor_split([self._model.config.num_quantizers], dim=1)
        indices = as_indices(inner, self._model.config.codebook_size)
        return torch.cat((self._model.quantizer.decode(indices.transpose(0, 1)), loudness), dim=1)


def load(name: str, files: ModelFiles, device: torch.device, **options: Value) -> Network:
    """Build the network; see `Loader`. The options are `build`'s."""
    return with_quantiser(EncodecNetwork(load_model(name, "encodec", files, device)), **options)


def _shape(config: Any, codes: bool) -> CodecShape:
    """The loudness is one more row, of codes too."""
    hop, rate = config.hop_length, config.sampling_rate
    rows = config.num_quantizers if codes else config.hidden_size
    # Normalisation over the chunk reaches all of its frames: no context suffices.
    native = config.normalize or config.norm_type == "time_group_norm"
    return CodecShape(
        sample_rate=rate,
        channels=config.audio_channels,
        latent_channels=rows + int(config.normalize),
        hop=hop,
        context=None if native else Context(CONTEXT, 0),
        chunk_frames=round((config.chunk_length or CHUNK_SECONDS * rate) / hop),
        overlap_frames=NATIVE_OVERLAP if native else CONTEXT,
        batch_size={"cpu": 1, "cuda": 64 if native else 16},
        own_length=native,
    )


build = partial(build_codec, Family("encodec", load, _shape))
