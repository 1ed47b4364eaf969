"""The model `encodec:REPO`: EnCodec as implemented in transformers.

A. Défossez and others, "High Fidelity Neural Audio Compression", TMLR 2023. The latents are the
encoder's output before quantisation.

The 24 kHz model is causal and has an LSTM whose memory decays: the error that trimming leaves is
small after `CONTEXT` frames. The 32 kHz model (MusicGen's) is not causal: a frame also depends on
the next 4 frames. The 48 kHz model normalises each native chunk of one second twice: by
GroupNorm in the network and by the chunk's loudness before it. The decoder needs the loudness, so
it is stored as an additional (the last) latent channel, the same in every frame of a chunk. Chunks
are encoded at their own length, because padding would change the loudness; the codec pads the last
hop by reflection.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from latentmill.models.base import Context, ModelSpec
from latentmill.models.families.codec import CHUNK_SECONDS, codec_spec
from latentmill.models.families.streaming import PADDING_MODES, Steps
from latentmill.models.families.transformers_codec import CodecFamily, as_indices, build_codec

if TYPE_CHECKING:
    from latentmill.models.base import State

CONTEXT = 48  # error 1e-5 of the latents' norm (random weights); the convolutions alone need 9
# Overlap of native chunks in frames. The codec's is 1.5 of 150. With 4, the overlap of decoding
# windows, the windows are the chunks and each has one loudness.
NATIVE_OVERLAP = 4


class EncodecNetwork:
    """The `EncodecModel` of transformers as a `QuantisingNetwork`.

    If the model normalises, the last row of latents and codes is the loudness.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        self._normalise: bool = model.config.normalize

    def encode(self, audio: Tensor) -> Tensor:
        if not self._normalise:
            latents: Tensor = self._model.encoder(audio)
            return latents
        mono = audio.mean(dim=1, keepdim=True)
        loudness = mono.square().mean(dim=-1, keepdim=True).sqrt() + 1e-8  # [B, 1, 1]
        latents = self._model.encoder(audio / loudness)
        return torch.cat((latents, loudness.expand(-1, 1, latents.shape[-1])), dim=1)

    def encode_step(
        self, audio: Tensor, states: Sequence[State | None]
    ) -> tuple[Tensor, list[State]]:
        """Only for the causal model, which does not normalise."""
        steps = Steps(states)
        hidden = audio
        for layer in self._model.encoder.layers:
            hidden = _step(layer, hidden, steps)
        return hidden, steps.after()

    def decode(self, latents: Tensor) -> Tensor:
        inner = latents[:, :-1] if self._normalise else latents
        audio: Tensor = self._model.decoder(inner)
        if self._normalise:
            audio = audio * F.interpolate(latents[:, -1:], size=audio.shape[-1], mode="linear")
        return audio

    def quantise(self, latents: Tensor) -> Tensor:
        """Quantise with all codebooks: the highest bandwidth."""
        inner, loudness = latents.tensor_split([self._model.config.hidden_size], dim=1)
        codes: Tensor = self._model.quantizer.encode(inner)  # [codebooks, B, Z]
        return torch.cat((codes.transpose(0, 1).float(), loudness), dim=1)

    def dequantise(self, codes: Tensor) -> Tensor:
        inner, loudness = codes.tensor_split([self._model.config.num_quantizers], dim=1)
        indices = as_indices(inner, self._model.config.codebook_size)
        return torch.cat((self._model.quantizer.decode(indices.transpose(0, 1)), loudness), dim=1)


def _step(layer: Any, hidden: Tensor, steps: Steps) -> Tensor:
    """Run a layer of the encoder on the next chunks."""
    if hasattr(layer, "padding_total"):  # EncodecConv1d
        padded = steps.padded(hidden, int(layer.padding_total), layer.pad_mode)
        convolved: Tensor = layer.conv(padded)
        return convolved
    if hasattr(layer, "block"):  # EncodecResnetBlock
        inner = hidden
        for one in layer.block:
            inner = _step(one, inner, steps)
        return _step(layer.shortcut, hidden, steps) + inner
    if hasattr(layer, "lstm"):  # EncodecLSTM
        start = hidden.new_zeros(len(hidden), 2, layer.lstm.num_layers, layer.lstm.hidden_size)
        memory = steps.before(start).permute(1, 2, 0, 3).contiguous()  # [2, layers, B, size]
        sequence = hidden.permute(2, 0, 1)
        processed, (output, cell) = layer.lstm(sequence, (memory[0], memory[1]))
        steps.keep(torch.stack((output, cell)).permute(2, 0, 1, 3))
        remembered: Tensor = processed + sequence
        return remembered.permute(1, 2, 0)
    result: Tensor = layer(hidden)
    return result


def _spec(config: Any, codes: bool) -> ModelSpec:
    hop, rate = config.hop_length, config.sampling_rate
    rows = config.num_quantizers if codes else config.hidden_size
    # Normalisation over the chunk changes all of its frames, so no context is enough.
    native = config.normalize or config.norm_type == "time_group_norm"
    streams = config.use_causal_conv and not native and config.pad_mode in PADDING_MODES
    ahead = 0 if config.use_causal_conv else frames_ahead(config)
    return codec_spec(
        "encodec",
        sample_rate=rate,
        channels=config.audio_channels,
        latent_channels=rows + int(config.normalize),
        hop=hop,
        context=None if native else Context(CONTEXT, ahead),
        chunk_frames=round((config.chunk_length or CHUNK_SECONDS * rate) / hop),
        # 3, so that the crossfade of decoding windows is `ahead` frames from their ends, too.
        overlap_frames=NATIVE_OVERLAP if native else CONTEXT + 3 * ahead,
        batch_size={"cpu": 1, "cuda": 64 if native else 16},
        own_length=native,
        step_frames=config.last_kernel_size if streams else 0,
        codebook_size=config.codebook_size if codes else None,
    )


def frames_ahead(config: Any) -> int:
    """Number of later latent frames that a frame depends on, if the convolutions are not causal.

    The padding of a convolution is its taps minus its stride; half of it is on the right.
    """
    convolutions = [(config.kernel_size, 1)]  # taps and stride
    for ratio in reversed(config.upsampling_ratios):
        for layer in range(config.num_residual_layers):
            dilation = config.dilation_growth_rate**layer
            convolutions.append(((config.residual_kernel_size - 1) * dilation + 1, 1))
        convolutions.append((2 * ratio, ratio))
    convolutions.append((config.last_kernel_size, 1))
    reach, rate = 0, 1  # input samples after the first one of a frame; samples per step
    for taps, stride in convolutions:
        reach += rate * (stride - 1 + (taps - stride) // 2)
        rate *= stride
    return reach // rate


build = partial(build_codec, CodecFamily("encodec", EncodecNetwork, _spec))
