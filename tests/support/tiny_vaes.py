"""Tiny random-weight repositories of VAEs of diffusers, as `save_pretrained` writes them.

Strides are the published ones, so that a chunk has as many frames as in the published models.
"""

from __future__ import annotations

from pathlib import Path

import torch


def write_vaes(root: Path) -> None:
    """Write one repository per case of the contract suite below `root`."""
    write_kvae(root / "kvae" / "diffusers")
    write_minimax(root / "minimax" / "audio_vae")
    write_longcat(root / "longcat" / "vae")


def write_kvae(folder: Path, seed: int = 0) -> None:
    from diffusers import AutoencoderKLKVAEAudio

    torch.manual_seed(seed)
    model = AutoencoderKLKVAEAudio(
        encoder_dim=2, latent_dim=16, codebook_dim=4, decoder_dim=64, attn_num_heads=2
    )
    for parameter in model.attn.to_q.parameters():
        parameter.data *= 20  # its own initialisation attends to all frames alike
    model.save_pretrained(folder)


def write_minimax(folder: Path, seed: int = 0) -> None:
    from diffusers import AutoencoderKLMiniMaxH3Audio

    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    model = AutoencoderKLMiniMaxH3Audio(
        encoder_dim=2,
        latent_dim=16,
        latent_channels=4,
        num_attention_heads=2,
        decoder_dim=128,
        resblock_kernel_sizes=(3,),
        resblock_dilation_sizes=((1,),),
        latents_mean=torch.randn(4, generator=generator).tolist(),
        latents_std=(0.1 + torch.rand(4, generator=generator)).tolist(),
    )
    for bias in (model.pre_block.attn.q_bias, model.pre_block.attn.v_bias):
        bias.data.normal_()  # zeros in its own initialisation
    model.save_pretrained(folder)


def write_longcat(folder: Path, seed: int = 0) -> None:
    from diffusers import LongCatAudioDiTVae

    torch.manual_seed(seed)
    model = LongCatAudioDiTVae(
        channels=2, strides=[2, 4, 4, 8, 8], latent_dim=4, encoder_latent_dim=8
    )
    model.save_pretrained(folder)
