"""The model `mmaudio:REPO`: the autoencoder of MMAudio and Kandinsky 6 as implemented in diffusers.

H. K. Cheng and others, "MMAudio", arXiv 2412.15322. The class computes a log-mel spectrogram and
encodes it; a token attends to the whole chunk. Decoding gives a spectrogram, which a vocoder turns
into audio.
"""

from __future__ import annotations

import math
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from latentmill.models.base import ModelSpec, Value
from latentmill.models.families.codec import (
    CHUNK_SECONDS,
    CodecHandle,
    check_scale_factor,
    codec_spec,
    make_handle,
)
from latentmill.models.families.diffusers_codec import find_autoencoder, load_autoencoder
from latentmill.models.families.posterior import Posterior, gaussian_posterior, mean_of
from latentmill.models.families.vocoder import load_vocoder
from latentmill.models.weights import ModelFiles, import_package

CLASS = "MMAudioVAE"
VOCODER = "MMAudioVocoder"
OVERLAP_SHARE = 0.05  # of a chunk; with random weights on music, more changes nothing


class MMAudioNetwork:
    """`MMAudioVAE`, and `MMAudioVocoder` for decoding."""

    def __init__(self, name: str, files: ModelFiles, device: torch.device, std: bool) -> None:
        self._name, self._files, self._device, self._std = name, files, device, std
        self._model = load_autoencoder(name, CLASS, files, device)

    def encode(self, audio: Tensor) -> Tensor:
        """Encode to unscaled latents; an autocast region does not affect the spectrogram."""
        with torch.autocast(audio.device.type, enabled=False):
            mel = self._model.mel_converter(audio[:, 0])
        return gaussian_posterior(self._model.vae.encode(mel), self._std)

    def decode(self, latents: Tensor) -> Tensor:
        mel = self._model.decode(mean_of(latents, self._std)).sample
        audio: Tensor = self._vocoder(mel).sample
        return audio

    @cached_property
    def _vocoder(self) -> Any:
        return load_vocoder(self._name, self._files, self._device, self._make_vocoder)

    def _make_vocoder(self, config: dict[str, Any]) -> Any:
        package, _ = import_package(self._name, "diffusers")
        mine = self._model.config
        samples, bins = math.prod(config["upsample_rates"]), config["num_mels"]
        if (samples, bins) != (mine["hop_length"], mine["mel_bins"]):
            raise ValueError(
                f"it takes {bins} mel bins and returns {samples} samples for a frame, but the "
                f"autoencoder has {mine['mel_bins']} bins and a hop of {mine['hop_length']}"
            )
        return getattr(package, VOCODER).from_config(config)


def load(name: str, files: ModelFiles, device: torch.device, **options: Value) -> MMAudioNetwork:
    """Build the network from its configuration and its state dict; see `NetworkLoader`."""
    return MMAudioNetwork(name, files, device, std=options["posterior"] == "mean+std")


def build(
    repo: str,
    *,
    revision: str | None = None,
    subfolder: str | None = None,
    scale_factor: float | None = None,
    posterior: Posterior = "mean",
) -> CodecHandle:
    """Find the model's files and make its handle; docs/models.md describes the options."""
    name = f"mmaudio:{repo}"
    found = find_autoencoder(name, CLASS, repo, revision, subfolder, default="audio_vae")
    if scale_factor is None:
        scale_factor = found.config.get("scaling_factor", 0.417)
    return make_handle(
        found,
        partial(_spec, std=posterior == "mean+std"),
        load,
        scale_factor=check_scale_factor(name, scale_factor),
        encoding={"posterior": posterior},
    )


def _spec(config: dict[str, Any], *, std: bool) -> ModelSpec:
    rate, hop = config["sample_rate"], 2 * config["hop_length"]
    if hop <= (config["n_fft"] - hop // 2) // 2:
        raise ValueError("its windows are too long for audio of one frame")
    chunk = round(CHUNK_SECONDS * rate / hop)
    return codec_spec(
        "mmaudio",
        sample_rate=rate,
        channels=1,
        latent_channels=config["latent_channels"] * (2 if std else 1),
        hop=hop,
        context=None,
        chunk_frames=chunk,
        overlap_frames=round(OVERLAP_SHARE * chunk),
    )
