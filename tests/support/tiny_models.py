"""Tiny random-weight repositories of the real classes, as their authors' `save_pretrained` writes.

They keep what lengths and contexts depend on (strides, kernels, dilations, attention windows) and
have few channels.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from support.tiny_diffusers import write_diffusers
from support.tiny_vaes import write_vaes

if TYPE_CHECKING:
    import pytest


def write_repos(root: Path) -> None:
    """Write one repository per case of the contract suite below `root`."""
    write_diffusers(root)
    write_oobleck(root / "oobleck" / "vae")
    write_same(root / "same")
    write_encodec(root / "encodec-24k")
    write_encodec(root / "encodec-32k", **ENCODEC_32K)
    write_encodec(root / "encodec-48k", **ENCODEC_48K)
    write_dac(root / "dac-44k", downsampling_ratios=[2, 4, 8, 8], sampling_rate=44100)
    write_dac(root / "dac-24k", downsampling_ratios=[2, 4, 5, 8], sampling_rate=24000)
    write_mimi(root / "mimi")
    write_pockettts(root / "pockettts")
    write_vibevoice(root / "vibevoice")
    write_music2latent(root / "music2latent")
    write_trained(root / "trained")
    write_vaes(root)


def write_oobleck(folder: Path, seed: int = 0) -> None:
    from diffusers import AutoencoderOobleck

    torch.manual_seed(seed)
    model = AutoencoderOobleck(
        encoder_hidden_size=8,
        downsampling_ratios=[2, 4, 8],
        channel_multiples=[1, 2, 2],
        decoder_channels=4,
        decoder_input_channels=4,
    )
    model.save_pretrained(folder)


def write_same(folder: Path, seed: int = 0) -> None:
    """As deep as the model is, its zero-initialised layers random, so that every one counts."""
    from diffusers import AutoencoderSAME

    torch.manual_seed(seed)
    model = AutoencoderSAME(
        patch_size=16,
        encoder_channels=4,
        encoder_c_mults=[4],
        encoder_strides=[4],
        encoder_transformer_depths=[3],
        latent_dim=6,
        dim_heads=8,
    )
    for parameter in model.parameters():
        if parameter.ndim == 2 and not parameter.any():
            parameter.data.normal_(std=0.2)
    model.bottleneck.running_std.fill_(1.7)
    model.save_pretrained(folder)


ENCODEC_32K: dict[str, Any] = {
    "sampling_rate": 32000,
    "upsampling_ratios": [8, 5, 4, 4],
    "use_causal_conv": False,
    "use_conv_shortcut": False,
}
ENCODEC_48K: dict[str, Any] = {
    "sampling_rate": 48000,
    "audio_channels": 2,
    "normalize": True,
    "chunk_length_s": 1.0,
    "overlap": 0.01,
    "norm_type": "time_group_norm",
    "use_causal_conv": False,
}


def write_trained(run: Path, seed: int = 0) -> None:
    """The folder of a run that trained a tiny `conv`."""
    from latentmill.models.families.trained import Trained
    from latentmill.training.architectures import Conv
    from latentmill.training.export import write_model
    from latentmill.training.settings import TrainSettings

    torch.manual_seed(seed)
    shape = {"sample_rate": 8000, "strides": (4, 4), "width": 8, "latent_channels": 6}
    network = Conv(TrainSettings.model_validate({"source": "", "out": "", "network": shape}))
    trained = Trained(architecture="conv", network=network.shape(), run="tiny", step=3)
    write_model(run, network, trained)


def write_encodec(folder: Path, seed: int = 0, **config: Any) -> None:
    from transformers import EncodecConfig, EncodecModel

    torch.manual_seed(seed)
    small: dict[str, Any] = {"num_filters": 2, "hidden_size": 8, "codebook_size": 16}
    small["target_bandwidths"] = [1.2]
    # Its latents hardly move: entries near each other, so that codes do.
    _save(EncodecModel(EncodecConfig(**small | config)), folder, spread=0.02)


def write_dac(folder: Path, seed: int = 0, **config: Any) -> None:
    from transformers import DacConfig, DacModel

    torch.manual_seed(seed)
    small = {"encoder_hidden_size": 2, "decoder_hidden_size": 32, "n_codebooks": 2}
    model = DacModel(DacConfig(**small, codebook_size=16, **config))
    for module in model.modules():  # its own initialisation is so small that silence comes out
        if isinstance(module, torch.nn.Conv1d):
            torch.nn.init.kaiming_uniform_(module.weight, a=math.sqrt(5))
    _save(model, folder)


def write_mimi(folder: Path, seed: int = 0, **changes: Any) -> None:
    from transformers import MimiConfig, MimiModel

    torch.manual_seed(seed)
    small: dict[str, Any] = {
        "hidden_size": 16,
        "num_filters": 2,
        "codebook_size": 16,
        "codebook_dim": 8,
        "vector_quantization_hidden_dimension": 8,
        "num_quantizers": 3,
        "num_hidden_layers": 3,
        "intermediate_size": 32,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "upsample_groups": 16,
    }
    _save(MimiModel(MimiConfig(**small | changes)), folder)


def write_pockettts(folder: Path, seed: int = 0, **config: Any) -> None:
    from transformers import PocketTTSAudioTokenizerConfig, PocketTTSAudioTokenizerModel

    torch.manual_seed(seed)
    small: dict[str, Any] = {
        "hidden_size": 16,
        "num_filters": 2,
        "latent_dim": 6,
        "intermediate_size": 32,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "upsample_groups": 16,
        "sliding_window": 50,
        "layer_scale_initial_scale": 0.5,  # so that the transformer counts
    }
    model = PocketTTSAudioTokenizerModel(PocketTTSAudioTokenizerConfig(**small | config))
    model.save_pretrained(folder)


def write_vibevoice(folder: Path, seed: int = 0, **changes: Any) -> None:
    """Its blocks, which are initialised to have no effect, count."""
    from transformers import VibeVoiceAcousticTokenizerConfig, VibeVoiceAcousticTokenizerModel

    torch.manual_seed(seed)
    small: dict[str, Any] = {
        "hidden_size": 6,
        "num_filters": 4,
        "downsampling_ratios": [2, 4, 5],
        "depths": [1, 1, 1, 3],
        "layer_scale_init_value": 0.5,
        "initializer_range": 0.3,
    }
    config = VibeVoiceAcousticTokenizerConfig(**small | changes)
    VibeVoiceAcousticTokenizerModel(config).save_pretrained(folder)


def _save(model: Any, folder: Path, spread: float = 1.0) -> None:
    """Save a codec of transformers, its codebooks filled."""
    for name, buffer in model.named_buffers():
        if name.endswith(("embed", "embed_sum")):
            buffer.normal_(std=spread)
    model.save_pretrained(folder)


MUSIC2LATENT = {  # of the module music2latent.hparams
    "base_channels": 4,
    "bottleneck_base_channels": 32,
    "cond_channels": 16,
    "layers_list": [1, 1, 1, 1, 1],
}


def shrink_music2latent(patch: pytest.MonkeyPatch) -> None:
    """Let the package, which has no configuration files, build a small network."""
    from music2latent import models

    for name, value in MUSIC2LATENT.items():
        patch.setattr(models, name, value)


def write_music2latent(folder: Path, seed: int = 0) -> None:
    """Write the checkpoint of a network as large as the package presently builds it."""
    from music2latent.models import UNet

    torch.manual_seed(seed)
    unet = UNet()
    for parameter in unet.parameters():
        if not parameter.any():  # zero-initialised: nothing behind it would count
            parameter.data.normal_(std=0.1)
    folder.mkdir(parents=True)
    torch.save({"gen_state_dict": unet.state_dict()}, folder / "music2latent.pt")
