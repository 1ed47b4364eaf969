"""Tiny random-weight repositories of diffusers' audio models, in the layout of their pipelines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch


def write_diffusers(root: Path) -> None:
    """Write one repository per family below `root`."""
    write_ace_step(root / "ace-step" / "vae")
    write_cosmos(root / "cosmos" / "sound_tokenizer")


def write_ace_step(folder: Path, seed: int = 0) -> None:
    """The configuration of ACE-Step 1.5's VAE with 2 latent channels instead of 64."""
    from diffusers import AutoencoderOobleck

    torch.manual_seed(seed)
    model = AutoencoderOobleck(
        encoder_hidden_size=4,  # also twice the number of latent channels
        downsampling_ratios=[2, 4, 4, 6, 10],
        channel_multiples=[1, 1, 1, 1, 1],
        decoder_channels=2,
        decoder_input_channels=2,
        audio_channels=2,
        sampling_rate=48000,
    )
    model.save_pretrained(folder)


def write_cosmos(folder: Path, seed: int = 0, **config: Any) -> None:
    """Strides of both kinds, odd and even."""
    from diffusers import Cosmos3AVAEAudioTokenizer

    torch.manual_seed(seed)
    small: dict[str, Any] = {
        "vocoder_input_dim": 4,
        "dec_dim": 4,
        "dec_c_mults": (1, 2, 2),
        "dec_strides": (4, 4, 6),
        "enc_dim": 8,
        "enc_c_mults": (1, 2),
        "enc_strides": (4, 3),
        "enc_n_fft": 32,
        "enc_hop_length": 8,
        "enc_latent_dim": 8,
    }
    Cosmos3AVAEAudioTokenizer(**small | config).save_pretrained(folder)
