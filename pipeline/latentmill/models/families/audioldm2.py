"""The model `audioldm2:REPO`: the autoencoder of AudioLDM 2, AudioLDM and MusicLDM in diffusers.

H. Liu and others, "AudioLDM 2", arXiv 2308.05734. `AutoencoderKL` encodes log-mel spectrograms as
images: it normalises over the chunk and attends to all of it. Channels and mel bins of a latent are
one axis here. The spectrogram is that of the authors' training code; diffusers has none. Rate, hop
and mel bins are those of the vocoder's configuration.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from latentmill.models.base import ModelSpec, Value
from latentmill.models.families.codec import (
    CodecHandle,
    check_scale_factor,
    codec_spec,
    make_handle,
)
from latentmill.models.families.diffusers_codec import find_autoencoder, load_autoencoder
from latentmill.models.families.mel import LogMel, pack, unpack
from latentmill.models.families.posterior import Posterior, gaussian_posterior, mean_of
from latentmill.models.families.vocoder import load_vocoder, vocoder_folders
from latentmill.models.weights import ModelFiles, find, import_package, read_config

CLASS = "AutoencoderKL"
N_FFT, RATE, HOP = 1024, 16000, 160  # of the training code
STEMS = ("model.safetensors", "pytorch_model.bin")  # of transformers
CHUNK_FRAMES = 1024  # of the spectrogram: 10.24 s, the length of the clips in training
OVERLAP_FRAMES = 100  # of the spectrogram
# Names of tensors before diffusers 0.18, which the checkpoints of AudioLDM have.
OLD_NAMES = {
    ".query.": ".to_q.",
    ".key.": ".to_k.",
    ".value.": ".to_v.",
    ".proj_attn.": ".to_out.0.",
}


class AudioLDM2Network:
    """`AutoencoderKL` after a log-mel spectrogram, and `SpeechT5HifiGan` for decoding."""

    def __init__(self, name: str, files: ModelFiles, device: torch.device, std: bool) -> None:
        self._name, self._files, self._device, self._std = name, files, device, std
        self._model = load_autoencoder(name, CLASS, files, device, renamed=_renamed)
        self._bins = read_config(name, files.paths["vocoder_config"])["model_in_dim"]
        self._mel = LogMel(
            RATE, self._bins, n_fft=N_FFT, hop=HOP, pad=(N_FFT - HOP) // 2, device=device
        )

    def encode(self, audio: Tensor) -> Tensor:
        """Encode to packed, unscaled latents."""
        moments = self._model.encode(self._mel(audio)).latent_dist.parameters
        return pack(gaussian_posterior(moments, self._std))

    def decode(self, latents: Tensor) -> Tensor:
        bins = self._bins // _factor(self._model.config)
        mel = self._model.decode(unpack(mean_of(latents, self._std), bins)).sample
        audio: Tensor = self._vocoder(mel[:, 0])
        return audio[:, None]

    @cached_property
    def _vocoder(self) -> Any:
        return load_vocoder(self._name, self._files, self._device, self._make_vocoder, STEMS)

    def _make_vocoder(self, config: dict[str, Any]) -> Any:
        package, _ = import_package(self._name, "transformers")
        known = package.SpeechT5HifiGanConfig().to_dict().keys() - {"model_type"}
        settings = {setting: value for setting, value in config.items() if setting in known}
        return package.SpeechT5HifiGan(package.SpeechT5HifiGanConfig(**settings))


def load(name: str, files: ModelFiles, device: torch.device, **options: Value) -> AudioLDM2Network:
    """Build the network from its configuration and its state dict; see `NetworkLoader`."""
    return AudioLDM2Network(name, files, device, std=options["posterior"] == "mean+std")


def build(
    repo: str,
    *,
    revision: str | None = None,
    subfolder: str | None = None,
    scale_factor: float | None = None,
    posterior: Posterior = "mean",
) -> CodecHandle:
    """Find the model's files and make its handle; docs/models.md describes the options."""
    name = f"audioldm2:{repo}"
    found = find_autoencoder(name, CLASS, repo, revision, subfolder)
    vocoder = {"config": [f"{folder}config.json" for folder in vocoder_folders(found.files)]}
    its = find(name, found.files.repo, vocoder)
    files = replace(
        found.files,
        names={**found.files.names, "vocoder_config": its.names["config"]},
        sha256={**found.files.sha256, "vocoder_config": its.sha256["config"]},
        paths={**found.files.paths, "vocoder_config": its.paths["config"]},
    )
    if scale_factor is None:
        scale_factor = found.config.get("scaling_factor", 1.0)
    return make_handle(
        replace(found, files=files),
        partial(
            _spec,
            vocoder=read_config(name, its.paths["config"]),
            std=posterior == "mean+std",
        ),
        load,
        scale_factor=check_scale_factor(name, scale_factor),
        encoding={"posterior": posterior, "n_fft": N_FFT},
    )


def _spec(config: dict[str, Any], *, vocoder: Mapping[str, Any], std: bool) -> ModelSpec:
    rate, hop = vocoder["sampling_rate"], math.prod(vocoder["upsample_rates"])
    if (rate, hop, config["in_channels"]) != (RATE, HOP, 1):
        raise ValueError(
            f"it has {config['in_channels']} channels, and its vocoder {rate} Hz and a hop of "
            f"{hop}; only spectrograms of 16000 Hz with a hop of 160 are supported"
        )
    factor = _factor(config)
    rows = config["latent_channels"] * vocoder["model_in_dim"] // factor
    return codec_spec(
        "audioldm2",
        sample_rate=rate,
        channels=1,
        latent_channels=rows * (2 if std else 1),
        hop=hop * factor,
        context=None,
        chunk_frames=CHUNK_FRAMES // factor,
        overlap_frames=OVERLAP_FRAMES // factor,
    )


def _factor(config: Mapping[str, Any]) -> int:
    """How many frames, and how many mel bins, of the spectrogram are one of the latent."""
    levels: int = len(config["block_out_channels"])
    return int(2 ** (levels - 1))


def _renamed(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors under their present names."""
    renamed = {}
    for name, tensor in state.items():
        for old, new in OLD_NAMES.items():
            name = name.replace(old, new)  # noqa: PLW2901
        renamed[name] = tensor
    return renamed
