"""Stability AI's own format of autoencoders, converted to the classes of diffusers in memory.

A repository in this format has `model_config.json` and the weights of stable-audio-tools, either of
the autoencoder alone or of a diffusion model with the autoencoder in it (`pretransform.model.`).
The mapping of names follows from the two implementations: their modules are the same and are called
in the same order. In stable-audio-tools an encoder is one list of layers without names, the
attention of SAME has its two halves in another order (`[q, k, v, q2, k2]`), and the parameters of
Snake have one dimension.

Settings that the classes of diffusers do not implement are errors. The published SAME-S is one of
them: it attends within chunks of two frames, while the class has a sliding window.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

CONFIGS = ("model_config.json", "vae_model_config.json")
WEIGHTS = ("model.safetensors", "model.ckpt", "vae_model.ckpt")
ENTRY = "state_dict"  # of a .ckpt file

State = dict[str, Tensor]
Config = dict[str, Any]


@dataclass(frozen=True)
class OwnFormat:
    """How one class of diffusers is made from stable-audio-tools' configuration and weights.

    Attributes:
        config: Converts the configuration of the autoencoder and the sample rate.
        state: Converts the autoencoder's state dict, with the converted configuration.
    """

    config: Callable[[Config, int], Config]
    state: Callable[[State, Config], State]


class UnsupportedCheckpointError(ValueError):
    """A setting of stable-audio-tools that the class of diffusers does not have."""


def autoencoder_of(config: Config) -> tuple[Config, str]:
    """The configuration of the autoencoder in a model's, and the prefix of its weights' names."""
    model = config["model"]
    if config["model_type"] == "autoencoder":
        return model, ""
    pretransform = model["pretransform"]
    _require(pretransform, "pretransform", scale=1.0)
    return pretransform["config"], "pretransform.model."


def own_weights(state: State, prefix: str) -> State:
    """The weights of the autoencoder, with the names that they have in it."""
    if not prefix and any(name.startswith("autoencoder.") for name in state):  # of a training run
        prefix = "autoencoder."
    return {
        _weight_norm(name.removeprefix(prefix)): value
        for name, value in state.items()
        if name.startswith(prefix)
    }


def _weight_norm(name: str) -> str:
    """Names of weight_norm as a parametrization, in the form that the classes of diffusers have."""
    return name.replace("parametrizations.weight.original0", "weight_g").replace(
        "parametrizations.weight.original1", "weight_v"
    )


def _require(settings: Mapping[str, Any], where: str, **values: Any) -> None:
    """Raise unless settings have these values or are missing."""
    for name, value in values.items():
        if settings.get(name, value) not in (value, None):
            raise UnsupportedCheckpointError(f"{name} = {settings[name]!r} of its {where}")


def _type(part: Mapping[str, Any], where: str, kind: str) -> Config:
    if part["type"] != kind:
        raise UnsupportedCheckpointError(f"type = {part['type']!r} of its {where}")
    settings: Config = part["config"]
    return settings


# --- Stable Audio Open ---------------------------------------------------------------------------


def oobleck_config(model: Config, sample_rate: int) -> Config:
    """The configuration of `AutoencoderOobleck`."""
    encoder, decoder = (_type(model[part], part, "oobleck") for part in ("encoder", "decoder"))
    if model["bottleneck"]["type"] != "vae":
        raise UnsupportedCheckpointError(
            f"type = {model['bottleneck']['type']!r} of its bottleneck"
        )
    for part, settings in (("encoder", encoder), ("decoder", decoder)):
        _require(settings, part, use_snake=True, antialias_activation=False)
        _require(settings, part, c_mults=encoder["c_mults"], strides=encoder["strides"])
    _require(decoder, "decoder", final_tanh=False, use_nearest_upsample=False)
    _require(encoder, "encoder", latent_dim=encoder["channels"])
    return {
        "encoder_hidden_size": encoder["channels"],
        "downsampling_ratios": encoder["strides"],
        "channel_multiples": encoder["c_mults"],
        "decoder_channels": decoder["channels"],
        "decoder_input_channels": decoder["latent_dim"],
        "audio_channels": model["io_channels"],
        "sampling_rate": sample_rate,
    }


_UNIT = {"0": "snake1", "1": "conv1", "2": "snake2", "3": "conv2"}
_ENCODER_BLOCK = {"0": "res_unit1", "1": "res_unit2", "2": "res_unit3", "3": "snake1", "4": "conv1"}
_DECODER_BLOCK = {
    "0": "snake1",
    "1": "conv_t1",
    "2": "res_unit1",
    "3": "res_unit2",
    "4": "res_unit3",
}


def oobleck_state(state: State, config: Config) -> State:
    """The state dict of `AutoencoderOobleck`."""
    return {
        _oobleck_name(name, len(config["downsampling_ratios"])): _snake_shape(name, value)
        for name, value in state.items()
    }


def _oobleck_name(name: str, blocks: int) -> str:
    """`encoder.layers.1.layers.0.layers.1.bias` -> `encoder.block.0.res_unit1.conv1.bias`."""
    side, *path, leaf = [part for part in name.split(".") if part != "layers"]
    first = int(path[0])
    ends = {0: "conv1", blocks + 1: "snake1", blocks + 2: "conv2"}
    if first in ends:
        return f"{side}.{ends[first]}.{leaf}"
    block = _ENCODER_BLOCK if side == "encoder" else _DECODER_BLOCK
    inner = [block[path[1]], *(_UNIT[part] for part in path[2:])]
    return ".".join([side, "block", str(first - 1), *inner, leaf])


def _snake_shape(name: str, value: Tensor) -> Tensor:
    return value.view(1, -1, 1) if name.endswith((".alpha", ".beta")) else value


# --- Stable Audio 3 ------------------------------------------------------------------------------


def same_config(model: Config, sample_rate: int) -> Config:
    """The configuration of `AutoencoderSAME`."""
    encoder, decoder = (_type(model[part], part, "same") for part in ("encoder", "decoder"))
    patches = _type(model["pretransform"], "pretransform", "patched")
    _type(model["bottleneck"], "bottleneck", "softnorm")
    levels = len(encoder["strides"])
    for part, settings in (("encoder", encoder), ("decoder", decoder)):
        if settings.get("sliding_window") is None:
            raise UnsupportedCheckpointError(f"attention within chunks in its {part}")
        _require(settings, part, sliding_window=[encoder["sliding_window"][0]] * 2)
        if not settings.get("variable_stride", False):
            raise UnsupportedCheckpointError(f"variable_stride = False of its {part}")
        _require(settings, part, dyt=True, mapping_bias=True, **dict.fromkeys(_NOT_IN_SAME, False))
        shared = ("channels", "c_mults", "strides", "transformer_depths", "dim_heads", "ff_mult")
        _require(settings, part, **{name: encoder[name] for name in shared if name in encoder})
        _require(settings, part, differential=encoder.get("differential", True))
    return {
        "audio_channels": model["io_channels"],
        "patch_size": patches["patch_size"],
        "encoder_channels": encoder["channels"],
        "encoder_c_mults": encoder["c_mults"],
        "encoder_strides": encoder["strides"],
        "encoder_transformer_depths": encoder["transformer_depths"],
        "latent_dim": encoder["latent_dim"],
        "use_differential_attention": encoder.get("differential", True),
        "dim_heads": encoder.get("dim_heads", 128),
        "ff_mult": encoder.get("ff_mult", 3),
        "sliding_window": encoder["sliding_window"][0],
        "encoder_sinusoidal_blocks": encoder.get("sinusoidal_blocks") or [0] * levels,
        "decoder_sinusoidal_blocks": decoder.get("sinusoidal_blocks") or [0] * levels,
        "sampling_rate": sample_rate,
    }


_NOT_IN_SAME = (
    "conv_mapping",
    "causal",
    "conformer",
    "layer_scale",
    "cross_attn",
    "feat_scale",
    "use_snake",
    "use_dilated_conv",
)
_SAME_NAMES = {
    "pre_norm.": "norm_attn.",
    "self_attn.": "attn.",
    "ff_norm.": "norm_ff.",
    "ff.ff.0.proj.": "ff.proj_in.",
    "ff.ff.2.": "ff.proj_out.",
}
# The same in every model (frequencies of positions), and noise of the training.
_NOT_STORED = re.compile(r"\.rope\.inv_freq$|^bottleneck\.noise_scaling_factor$|^pretransform\.")


def same_state(state: State, config: Config) -> State:
    """The state dict of `AutoencoderSAME`."""
    levels = len(config["encoder_strides"])
    converted = {}
    for name, value in state.items():
        if _NOT_STORED.search(name):
            continue
        attention = name.endswith(".self_attn.to_qkv.weight")
        if attention and config["use_differential_attention"]:
            q, k, v, q2, k2 = value.chunk(5)
            converted[_same_name(name, levels)] = torch.cat((q, q2, k, k2, v))
        else:
            converted[_same_name(name, levels)] = value
    return converted


def _same_name(name: str, levels: int) -> str:
    """`decoder.layers.3.transformers.0.pre_norm.beta` -> `decoder.blocks.0. ... norm_attn.beta`.

    The layers of an encoder are its levels, a transposition, the projection and a transposition;
    those of a decoder are the same, backwards.
    """
    if name == "bottleneck.scaling_factor":
        return "bottleneck.scale"
    found = re.fullmatch(r"(encoder|decoder)\.layers\.(\d+)\.(.*)", name)
    if found is None:
        return name
    side, layer, rest = found[1], int(found[2]), found[3]
    projection, first = (levels + 1, 0) if side == "encoder" else (1, 3)
    if layer == projection:
        return f"{side}.proj.{rest}"
    for theirs, ours in _SAME_NAMES.items():
        rest = re.sub(rf"^(transformers\.\d+\.){re.escape(theirs)}", rf"\g<1>{ours}", rest)
    return f"{side}.blocks.{layer - first}.{rest}"


OOBLECK = OwnFormat(oobleck_config, oobleck_state)
SAME = OwnFormat(same_config, same_state)
