"""Tiny random-weight repositories of diffusers' audio models, in the layout of their pipelines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch


def write_diffusers(root: Path) -> None:
    """Write one repository per family below `root`."""
    write_ace_step(root / "ace-step" / "vae")
    write_cosmos(root / "cosmos" / "sound_tokenizer")
    write_mmaudio(root / "mmaudio")
    write_ltx2(root / "ltx2")
    write_audioldm2(root / "audioldm2")


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


def write_mmaudio(repo: Path, seed: int = 0) -> None:
    from diffusers import MMAudioVAE, MMAudioVocoder

    torch.manual_seed(seed)
    vae = MMAudioVAE(
        mel_bins=16,
        latent_channels=4,
        hidden_channels=8,
        channel_multipliers=(1, 2),
        layers_per_block=1,
        sample_rate=8000,
        n_fft=256,
        hop_length=64,
    )
    vae.vae.data_mean.normal_(mean=-5)
    vae.vae.data_std.fill_(2.5)
    vae.save_pretrained(repo / "audio_vae")
    vocoder = MMAudioVocoder(
        num_mels=16,
        upsample_initial_channel=8,
        upsample_rates=(16, 4),
        upsample_kernel_sizes=(32, 8),
        resblock_kernel_sizes=(3,),
        resblock_dilation_sizes=((1, 3),),
    )
    _widen(vocoder, 0.3).save_pretrained(repo / "vocoder")


def write_ltx2(repo: Path, seed: int = 0, **config: Any) -> None:
    """As deep as the model is; its vocoder is the first version's, with another sample rate."""
    from diffusers import AutoencoderKLLTX2Audio
    from diffusers.pipelines.ltx2.vocoder import LTX2Vocoder

    torch.manual_seed(seed)
    small: dict[str, Any] = {"base_channels": 8, "latent_channels": 2, "mel_bins": 16}
    vae = AutoencoderKLLTX2Audio(**small | config)
    vae.latents_mean.normal_()
    vae.latents_std.uniform_(0.5, 2)
    vae.save_pretrained(repo / "audio_vae")
    vocoder = LTX2Vocoder(
        in_channels=32,
        hidden_channels=8,
        upsample_kernel_sizes=[32, 31],
        upsample_factors=[16, 15],
        resnet_kernel_sizes=[3],
        resnet_dilations=[[1, 3]],
    )
    _widen(vocoder).save_pretrained(repo / "vocoder")


def write_ltx2_with_bandwidth_extension(folder: Path, seed: int = 0) -> None:
    """The vocoder of later versions for the autoencoder of `write_ltx2`."""
    from diffusers.pipelines.ltx2.vocoder import LTX2VocoderWithBWE

    torch.manual_seed(seed)
    vocoder = LTX2VocoderWithBWE(
        in_channels=32,
        hidden_channels=8,
        upsample_kernel_sizes=[32, 20],
        upsample_factors=[16, 10],
        resnet_kernel_sizes=[3],
        resnet_dilations=[[1, 3]],
        bwe_in_channels=32,
        bwe_hidden_channels=8,
        bwe_upsample_kernel_sizes=[32, 31],
        bwe_upsample_factors=[16, 15],
        bwe_resnet_kernel_sizes=[3],
        bwe_resnet_dilations=[[1, 3]],
        num_mel_channels=16,
    )
    for buffer in (vocoder.mel_stft.stft_fn.forward_basis, vocoder.mel_stft.mel_basis):
        buffer.normal_(std=0.05)
    _widen(vocoder).save_pretrained(folder)


def write_audioldm2(repo: Path, seed: int = 0) -> None:
    """The rate and the hop of the model, and the vocoder's older `model_type`."""
    from diffusers import AutoencoderKL
    from transformers import SpeechT5HifiGan, SpeechT5HifiGanConfig

    torch.manual_seed(seed)
    vae = AutoencoderKL(
        in_channels=1,
        out_channels=1,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(4, 4, 8),
        layers_per_block=1,
        latent_channels=2,
        norm_num_groups=2,
        scaling_factor=0.4110932946205139,
    )
    vae.save_pretrained(repo / "vae")
    config = SpeechT5HifiGanConfig(
        model_in_dim=16,
        upsample_initial_channel=8,
        upsample_rates=[16, 10],
        upsample_kernel_sizes=[32, 20],
        resblock_kernel_sizes=[3],
        resblock_dilation_sizes=[[1, 3]],
        normalize_before=False,
    )
    _widen(SpeechT5HifiGan(config)).save_pretrained(repo / "vocoder")
    path = repo / "vocoder" / "config.json"
    path.write_text(path.read_text().replace("speecht5_hifigan", "hifigan"))


def _widen(vocoder: Any, gain: float = 1) -> Any:
    """Other weights, because with the initial ones a vocoder returns almost silence or clips."""
    for module in vocoder.modules():
        if isinstance(module, (torch.nn.Conv1d, torch.nn.ConvTranspose1d)):
            torch.nn.init.kaiming_uniform_(module.weight, a=1)
            module.weight.data *= gain
    return vocoder
