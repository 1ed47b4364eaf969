"""The model `ltx2:REPO`: the audio autoencoder of LTX-2 as implemented in diffusers.

Y. HaCohen and others, "LTX-2", arXiv 2601.03233. The class encodes log-mel spectrograms, and its
convolutions are causal. Latents are packed and normalised as the pipeline does: channels and mel
bins are one axis, with the mean and the deviation of the checkpoint.

Frame i depends on the spectrogram up to its frame 4 i, so T samples have T / hop + 1 frames.
"""

from __future__ import annotations

import importlib
import math
from dataclasses import replace
from functools import cached_property, partial
from typing import Any

import soxr
import torch
from torch import Tensor

from latentmill.models.base import Context, ModelSpec, Value
from latentmill.models.families.codec import (
    CodecHandle,
    check_scale_factor,
    codec_spec,
    make_handle,
)
from latentmill.models.families.diffusers_codec import find_autoencoder, load_autoencoder
from latentmill.models.families.mel import LogMel, pack, unpack
from latentmill.models.families.posterior import Posterior, gaussian_posterior, mean_of
from latentmill.models.families.vocoder import load_vocoder
from latentmill.models.weights import ModelFiles

CLASS = "AutoencoderKLLTX2Audio"
VOCODERS = ("LTX2Vocoder", "LTX2VocoderWithBWE")
N_FFT = 1024  # `filter_length` of the published checkpoints; the class's configuration lacks it
LEVELS = 3  # of the class's decoder, which multiplies frames and bins by 4
CHUNK_SECONDS = 20.0  # of which neighbouring chunks share 1.1 s


class LTX2Network:
    """`AutoencoderKLLTX2Audio` after a log-mel spectrogram, and a vocoder for decoding."""

    def __init__(self, name: str, files: ModelFiles, device: torch.device, std: bool) -> None:
        self._name, self._files, self._device, self._std = name, files, device, std
        self._model = load_autoencoder(name, CLASS, files, device)
        config = self._model.config
        self._rate, self._hop = config["sample_rate"], config["mel_hop_length"]
        self._mel = LogMel(
            self._rate,
            config["mel_bins"],
            n_fft=N_FFT,
            hop=self._hop,
            pad=N_FFT // 2,
            device=device,
        )
        self._mean = self._model.latents_mean[:, None]
        self._deviation = self._model.latents_std[:, None]

    def encode(self, audio: Tensor) -> Tensor:
        """Encode to packed latents, normalised with the statistics of the checkpoint."""
        rows = pack(gaussian_posterior(self._model.encoder(self._mel(audio)), self._std))
        mean: Tensor = (mean_of(rows, self._std).float() - self._mean) / self._deviation
        if not self._std:
            return mean
        return torch.cat((mean, rows.chunk(2, dim=1)[1] / self._deviation), dim=1)

    def decode(self, latents: Tensor) -> Tensor:
        """Decode with the vocoder, and resample its audio to the rate of the autoencoder."""
        rows = mean_of(latents, self._std) * self._deviation + self._mean
        bins = self._model.config["mel_bins"] // 2 ** (LEVELS - 1)
        audio: Tensor = self._vocoder(self._model.decode(unpack(rows, bins)).sample)
        rate = self._vocoder.config["output_sampling_rate"]
        if rate == self._rate:
            return audio
        items = [one.float().cpu().numpy().T for one in audio]
        resampled = [torch.from_numpy(soxr.resample(one, rate, self._rate).T) for one in items]
        return torch.stack(resampled).to(audio.device)

    @cached_property
    def _vocoder(self) -> Any:
        return load_vocoder(self._name, self._files, self._device, self._make_vocoder)

    def _make_vocoder(self, config: dict[str, Any]) -> Any:
        kind = config.get("_class_name")
        if kind not in VOCODERS:
            raise ValueError(f"it belongs to {kind}")
        module = importlib.import_module("diffusers.pipelines.ltx2.vocoder")
        vocoder = getattr(module, kind).from_config(config)
        mine, its = self._model.config, vocoder.config
        rate = its.get("input_sampling_rate", its["output_sampling_rate"])
        hop, rows = self._hop * rate / self._rate, mine["output_channels"] * mine["mel_bins"]
        upsampling = math.prod(its["upsample_factors"])
        if (upsampling, its["in_channels"]) != (hop, rows):
            raise ValueError(
                f"it takes {its['in_channels']} mel bins and returns {upsampling} samples for a "
                f"frame, but the autoencoder has {rows} bins and a hop of {hop:g}"
            )
        return vocoder


def load(name: str, files: ModelFiles, device: torch.device, **options: Value) -> LTX2Network:
    """Build the network from its configuration and its state dict; see `NetworkLoader`."""
    return LTX2Network(name, files, device, std=options["posterior"] == "mean+std")


def build(
    repo: str,
    *,
    revision: str | None = None,
    subfolder: str | None = None,
    scale_factor: float = 1.0,
    posterior: Posterior = "mean",
) -> CodecHandle:
    """Find the model's files and make its handle; docs/models.md describes the options."""
    name = f"ltx2:{repo}"
    return make_handle(
        find_autoencoder(name, CLASS, repo, revision, subfolder, default="audio_vae"),
        partial(_spec, std=posterior == "mean+std"),
        load,
        scale_factor=check_scale_factor(name, scale_factor),
        encoding={"posterior": posterior, "n_fft": N_FFT},
    )


def encoder_context(blocks: int, hop: int) -> Context:
    """Number of latent frames on each side that a frame depends on.

    In frames of the spectrogram, on the left: a convolution reaches 2 steps back; there are one at
    the start, two in each of `blocks` blocks of a level, one between levels, two in each of two
    blocks in the middle, and one at the end. Steps are 1, 2 and 4 frames. On both sides, half a
    window of audio is mirrored at the start and the end of a chunk.
    """
    steps = [2**level for level in range(LEVELS)]
    reach = 2 + sum(2 * 2 * blocks * step for step in steps) + sum(2 * s for s in steps[:-1])
    reach += (2 * 2 * 2 + 2) * steps[-1]
    mirrored = math.ceil(N_FFT / 2 / hop)
    return Context(math.ceil((reach + mirrored) / steps[-1]), math.ceil(mirrored / steps[-1]))


def _spec(config: dict[str, Any], *, std: bool) -> ModelSpec:
    _check(config)
    mel_hop, rate = config["mel_hop_length"], config["sample_rate"]
    hop = mel_hop * 2 ** (LEVELS - 1)
    context = encoder_context(config["num_res_blocks"], mel_hop)
    latent_channels = config["latent_channels"] * config["mel_bins"] // 2 ** (LEVELS - 1)
    if latent_channels != config["base_channels"]:  # the shape of its statistics
        raise ValueError("base_channels is not latent_channels * mel_bins / 4")
    spec = codec_spec(
        "ltx2",
        sample_rate=rate,
        channels=config["in_channels"],
        latent_channels=latent_channels * (2 if std else 1),
        hop=hop,
        context=context,
        chunk_frames=round(CHUNK_SECONDS * rate / hop) + 1,
        overlap_frames=sum(context),
    )
    return replace(spec, overhang=-hop)


def _check(config: dict[str, Any]) -> None:
    """Raise `ValueError` for settings that change the frames' grid or make frames depend on all."""
    wanted: dict[str, Any] = {"causality_axis": "height", "norm_type": "pixel", "double_z": True}
    wanted |= {"mid_block_add_attention": False}
    for setting, value in wanted.items():
        if config.get(setting, value) != value:
            raise ValueError(f"{setting} is {config[setting]!r}, only {value!r} is supported")
    if config.get("attn_resolutions"):
        raise ValueError("attn_resolutions is set, only null is supported")
    if len(config["ch_mult"]) != LEVELS:
        raise ValueError(f"ch_mult has {len(config['ch_mult'])} levels, only 3 are supported")
