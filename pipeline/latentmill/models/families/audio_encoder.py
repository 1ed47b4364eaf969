"""The encoders of audio without a decoder: `clap:REPO` and `audio:REPO`, for fields of a store.

`clap:REPO` computes one vector for each window of 10 s, with the front end of its feature
extractor. `audio:REPO` computes the frames of wav2vec 2.0 and the models with its architecture
(HuBERT, WavLM, data2vec, UniSpeech): A. Baevski and others, "wav2vec 2.0", NeurIPS 2020.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from latentmill.errors import ModelError
from latentmill.models.base import Context, ModelHandle, ModelSpec, Value
from latentmill.models.families.codec import CodecHandle, FoundCodec, codec_spec, make_handle
from latentmill.models.families.transformers_files import find_encoder, load_network, model_config
from latentmill.models.inference.split import SplitHandle
from latentmill.models.weights import (
    LOAD_ERRORS,
    ModelFiles,
    does_not_load,
    import_package,
    parse_repo,
    read_config,
)

AUDIO_TYPES = (
    "wav2vec2",
    "hubert",
    "wavlm",
    "data2vec-audio",
    "unispeech",
    "unispeech-sat",
    "wav2vec2-conformer",
)
CHUNK_SECONDS, OVERLAP_SECONDS = 10.0, 1.0
MEL_FLOOR = 1e-10  # of transformers.audio_utils.spectrogram
UNUSED = ("masked_spec_embed",)  # only training uses it
_PREPROCESSOR = {"preprocessor": ["preprocessor_config.json"]}


@dataclass(frozen=True)
class AudioHandle(CodecHandle):
    """A model of audio that cannot decode."""

    kind: str = "frames"


def can_decode(handle: ModelHandle) -> bool:
    """Whether a model of audio has a decoder, also with `--channels split`."""
    inner = handle.inner if isinstance(handle, SplitHandle) else handle
    return not isinstance(inner, AudioHandle)


class _Encoder:
    """A network without a decoder."""

    def __init__(self, name: str) -> None:
        self._name = name

    def decode(self, latents: Tensor) -> Tensor:
        del latents
        raise ModelError(f"Model {self._name} cannot decode: its values are not latents of audio.")


class ClapAudio(_Encoder):
    """CLAP's audio tower: `[B, 1, T]` to `[B, D, windows]`, vectors of length 1."""

    def __init__(self, name: str, model: Any, extractor: Any, device: torch.device) -> None:
        super().__init__(name)
        self._model = model
        self._fused = extractor.truncation == "fusion"
        self._samples = int(extractor.nb_max_samples)
        self._fft, self._hop = extractor.fft_window_size, extractor.hop_length
        filters = extractor.mel_filters if self._fused else extractor.mel_filters_slaney
        self._filters = torch.tensor(filters, dtype=torch.float64, device=device)
        self._window = torch.hann_window(self._fft, dtype=torch.float64, device=device)

    def encode(self, audio: Tensor) -> Tensor:
        batch, _, samples = audio.shape
        if samples > self._samples:
            starts = range(0, samples, self._samples)
            windows = [audio[..., start : start + self._samples] for start in starts]
            return torch.cat([self.encode(window) for window in windows], dim=-1)
        # As the feature extractor does (`repeatpad`): whole repetitions, then zeros.
        whole = audio[:, 0].repeat(1, self._samples // samples)
        wave = torch.nn.functional.pad(whole, (0, self._samples - whole.shape[1]))
        with torch.autocast(audio.device.type, enabled=False):
            spectrum = torch.stft(
                wave.double(), self._fft, self._hop, window=self._window, return_complex=True
            )
            power = spectrum.abs().square().transpose(1, 2) @ self._filters  # [B, frames, bands]
            mel = 10 * power.clamp(min=MEL_FLOOR).log10().float()[:, None]
        if self._fused:  # as in the package, which marks a single short recording as long
            mel = mel.expand(-1, 4, -1, -1).contiguous()
        longer = torch.full((batch, 1), self._fused, device=audio.device)
        found = self._model.get_audio_features(input_features=mel, is_longer=longer)
        vectors: Tensor = found.pooler_output
        return vectors[:, :, None]


class AudioFrames(_Encoder):
    """wav2vec 2.0 and the like: `[B, 1, T]` to the hidden states of a layer, `[B, D, frames]`."""

    def __init__(self, name: str, model: Any, normalise: bool, layer: int | None) -> None:
        super().__init__(name)
        self._model, self._normalise, self._layer = model, normalise, layer

    def encode(self, audio: Tensor) -> Tensor:
        wave = audio[:, 0]
        if self._normalise:
            variance, mean = torch.var_mean(wave, 1, correction=0, keepdim=True)
            wave = (wave - mean) / (variance + 1e-7).sqrt()
        found = self._model(wave, output_hidden_states=self._layer is not None)
        states: Tensor = found.last_hidden_state
        if self._layer is not None:
            states = found.hidden_states[self._layer]
        return states.transpose(1, 2)


def _load_clap(name: str, files: ModelFiles, device: torch.device, **options: Value) -> ClapAudio:
    del options
    package, _ = import_package(name, "transformers")
    config = model_config(name, files, "clap")
    model = load_network(name, files, config, package.ClapModel)
    return ClapAudio(name, model.to(device), _clap_extractor(name, files), device)


def _load_audio(
    name: str, files: ModelFiles, device: torch.device, **options: Value
) -> AudioFrames:
    package, _ = import_package(name, "transformers")
    config = model_config(name, files, *AUDIO_TYPES)
    model = load_network(name, files, config, package.MODEL_MAPPING[type(config)], UNUSED)
    layer = options["layer"]
    normalise = bool(read_config(name, files.paths["preprocessor"]).get("do_normalize", True))
    assert layer is None or isinstance(layer, int)
    return AudioFrames(name, model.to(device), normalise, layer)


def _clap_extractor(name: str, files: ModelFiles) -> Any:
    package, _ = import_package(name, "transformers")
    path = files.paths["preprocessor"]
    try:
        extractor = package.ClapFeatureExtractor.from_dict(read_config(name, path))
        if extractor.truncation not in ("fusion", "rand_trunc") or extractor.padding != "repeatpad":
            raise ValueError(f"truncation {extractor.truncation}, padding {extractor.padding}")
        return extractor
    except LOAD_ERRORS as error:
        raise does_not_load(name, path, error) from error


def build_clap(repo: str, *, revision: str | None = None) -> AudioHandle:
    """`clap:REPO` for audio: a vector for each window."""
    name = f"clap:{repo}"
    found = _found(name, repo, revision, "clap")
    extractor = _clap_extractor(name, found.files)
    window = int(extractor.nb_max_samples)

    def spec(config: Any) -> ModelSpec:
        return codec_spec(
            "clap",
            sample_rate=extractor.sampling_rate,
            channels=1,
            latent_channels=config.projection_dim,
            hop=window,
            context=Context(0, 0),
            chunk_frames=1,
            own_length=True,
            min_samples=1,
        )

    handle = make_handle(found, spec, _load_clap, scale_factor=1.0)
    return AudioHandle(handle.spec, handle.files, handle.loader, handle.options, "vector")


def build_audio(repo: str, *, revision: str | None = None, layer: int | None = None) -> AudioHandle:
    """`audio:REPO`: the last hidden states, or those of a layer (0: before the first one)."""
    name = f"audio:{repo}"
    found = _found(name, repo, revision, *AUDIO_TYPES)
    if layer is not None and not 0 <= layer <= found.config.num_hidden_layers:
        raise ModelError(
            f"Model {name}: option layer must be 0 to {found.config.num_hidden_layers}, not "
            f"{layer}."
        )
    rate = int(read_config(name, found.files.paths["preprocessor"]).get("sampling_rate", 16000))

    def spec(config: Any) -> ModelSpec:
        hop, seen = 1, 1  # samples per frame, and samples that a frame sees
        for kernel, stride in zip(config.conv_kernel, config.conv_stride, strict=True):
            hop, seen = hop * stride, seen + (kernel - 1) * hop
        return codec_spec(
            config.model_type,
            sample_rate=rate,
            channels=1,
            latent_channels=config.hidden_size,
            hop=hop,
            overhang=seen - 1,
            context=None,
            chunk_frames=math.ceil(CHUNK_SECONDS * rate / hop),
            overlap_frames=math.ceil(OVERLAP_SECONDS * rate / hop),
            own_length=True,
            min_samples=seen,
        )

    handle = make_handle(found, spec, _load_audio, scale_factor=1.0, encoding={"layer": layer})
    return AudioHandle(handle.spec, handle.files, handle.loader, handle.options)


def _found(name: str, repo: str, revision: str | None, *types: str) -> FoundCodec:
    _, version = import_package(name, "transformers")
    files = find_encoder(name, parse_repo(name, repo, revision), _PREPROCESSOR, tokenizer=False)
    return FoundCodec(name, files, model_config(name, files, *types), "transformers", version)
