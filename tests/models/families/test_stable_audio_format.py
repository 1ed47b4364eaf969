"""Checkpoints as Stability AI publishes them: model_config.json and the weights of its own package.

The layouts are those of the published files. Stable Audio Open: the modules of
support/stable_audio_open.py, which compute the latents by themselves. Stable Audio 3: the names
listed below, of the tensors of stable-audio-3-medium, whose attention has its rows in the order
q, k, v, q2, k2.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from latentmill.errors import ModelError
from latentmill.models.base import Autoencoder
from latentmill.models.families.stable_audio import UnsupportedCheckpointError
from latentmill.models.registry import resolve
from support.stable_audio_open import OOBLECK, Tree, alone, open_audio_networks, write


def load(family: str, folder: Path, **options: Any) -> Autoencoder:
    return resolve(f"{family}:{folder}", options).load("cpu")


def noise(model: Autoencoder, frames: int) -> Tensor:
    shape = (2, model.spec.channels, model.spec.samples(frames))
    return 0.1 * torch.randn(shape, generator=torch.Generator().manual_seed(0))


def in_a_diffusion_model(autoencoder: Tree) -> Tree:
    pretransform = {"type": "autoencoder", "iterate_batch": True, "config": autoencoder}
    return {
        "model_type": "diffusion_cond",
        "sample_rate": 44100,
        "model": {"pretransform": pretransform, "diffusion": {"type": "dit"}},
    }


def with_prefix(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    others = {"model.model.to_cond_embed.0.weight": torch.zeros(3)} if prefix else {}
    return {f"{prefix}{name}": value for name, value in state.items()} | others


@pytest.mark.parametrize("layout", ["diffusion", "autoencoder", "training"])
@pytest.mark.parametrize("weight_norm_names", ["old", "new"])
def test_stable_audio_open_as_published(
    tmp_path: Path, layout: str, weight_norm_names: str
) -> None:
    encoder, decoder, state = open_audio_networks()
    if weight_norm_names == "old":  # those of the published files
        old = {"original0": "weight_g", "original1": "weight_v"}
        state = {
            name.replace("parametrizations.weight.original0", old["original0"]).replace(
                "parametrizations.weight.original1", old["original1"]
            ): value
            for name, value in state.items()
        }
    prefix = {"diffusion": "pretransform.model.", "autoencoder": "", "training": "autoencoder."}
    config = in_a_diffusion_model(OOBLECK) if layout == "diffusion" else alone(OOBLECK)
    file = "model.safetensors" if layout == "diffusion" else "model.ckpt"
    write(tmp_path, config, with_prefix(state, prefix[layout]), file)

    model = load("oobleck", tmp_path)
    assert (model.spec.hop, model.spec.sample_rate, model.spec.latent_channels) == (8, 44100, 4)
    x = noise(model, 40)
    with torch.inference_mode():
        mean = encoder(x).chunk(2, dim=1)[0]
        decoded = decoder(mean)
    assert (model.encode(x) - mean).norm() < 1e-5 * mean.norm()
    assert (model.decode(mean, x.shape[-1]) - decoded).norm() < 1e-5 * decoded.norm()
    assert mean.std() > 0.01
    assert decoded.std() > 0.01
    std = load("oobleck", tmp_path, posterior="mean+std")
    assert std.spec.latent_channels == 8


SAME: Tree = {
    "pretransform": {"type": "patched", "config": {"patch_size": 16, "channels": 2}},
    "encoder": {
        "type": "same",
        "config": {
            "in_channels": 32,
            "channels": 4,
            "c_mults": [4],
            "strides": [4],
            "latent_dim": 6,
            "transformer_depths": [3],
            "dim_heads": 8,
            "differential": True,
            "dyt": True,
            "variable_stride": True,
            "sliding_window": [1, 1],
            "checkpointing": True,
            "mask_noise": 0.0,
        },
    },
    "decoder": {
        "type": "same",
        "config": {
            "out_channels": 32,
            "channels": 4,
            "c_mults": [4],
            "strides": [4],
            "latent_dim": 6,
            "transformer_depths": [3],
            "sinusoidal_blocks": [2],
            "dim_heads": 8,
            "differential": True,
            "dyt": True,
            "variable_stride": True,
            "sliding_window": [1, 1],
            "mask_noise": 0.01,
        },
    },
    "bottleneck": {
        "type": "softnorm",
        "config": {"dim": 6, "noise_augment_dim": 0, "auto_scale": True},
    },
    "latent_dim": 6,
    "downsampling_ratio": 64,
    "io_channels": 2,
}

# Published name: name in AutoencoderSAME. L is a transformer layer.
TENSORS = {
    "bottleneck.bias": "bottleneck.bias",
    "bottleneck.running_std": "bottleneck.running_std",
    "bottleneck.scaling_factor": "bottleneck.scale",
    "encoder.layers.2.weight": "encoder.proj.weight",
    "encoder.layers.2.bias": "encoder.proj.bias",
    "decoder.layers.1.weight": "decoder.proj.weight",
    "decoder.layers.1.bias": "decoder.proj.bias",
}
BLOCKS = {"encoder.layers.0": "encoder.blocks.0", "decoder.layers.3": "decoder.blocks.0"}
OF_A_BLOCK = ("new_tokens", "mapping.weight_g", "mapping.weight_v", "mapping.bias")
OF_A_LAYER = {
    "pre_norm.alpha": "norm_attn.alpha",
    "pre_norm.beta": "norm_attn.beta",
    "pre_norm.gamma": "norm_attn.gamma",
    "self_attn.to_qkv.weight": "attn.to_qkv.weight",
    "self_attn.to_out.weight": "attn.to_out.weight",
    "self_attn.q_norm.alpha": "attn.q_norm.alpha",
    "self_attn.q_norm.beta": "attn.q_norm.beta",
    "self_attn.q_norm.gamma": "attn.q_norm.gamma",
    "self_attn.k_norm.alpha": "attn.k_norm.alpha",
    "self_attn.k_norm.beta": "attn.k_norm.beta",
    "self_attn.k_norm.gamma": "attn.k_norm.gamma",
    "ff_norm.alpha": "norm_ff.alpha",
    "ff_norm.beta": "norm_ff.beta",
    "ff_norm.gamma": "norm_ff.gamma",
    "ff.ff.0.proj.weight": "ff.proj_in.weight",
    "ff.ff.0.proj.bias": "ff.proj_in.bias",
    "ff.ff.2.weight": "ff.proj_out.weight",
    "ff.ff.2.bias": "ff.proj_out.bias",
}


def published_same(theirs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of an `AutoencoderSAME` with three layers, as it is published."""
    names = dict(TENSORS)
    for block, ours in BLOCKS.items():
        names |= {f"{block}.{name}": f"{ours}.{name}" for name in OF_A_BLOCK}
        for layer in range(3):
            names |= {
                f"{block}.transformers.{layer}.{name}": f"{ours}.transformers.{layer}.{other}"
                for name, other in OF_A_LAYER.items()
            }
    assert set(names.values()) == set(theirs)  # the listing is complete
    state = {name: theirs[other] for name, other in names.items()}
    for name, value in state.items():
        if name.endswith("to_qkv.weight"):  # in diffusers: q, q2, k, k2, v
            rows = value.shape[0] // 5
            state[name] = torch.cat([value[i * rows : (i + 1) * rows] for i in (0, 2, 4, 1, 3)])
    for block in BLOCKS:
        for layer in range(3):
            state[f"{block}.transformers.{layer}.rope.inv_freq"] = torch.ones(2)
    return state | {"bottleneck.noise_scaling_factor": torch.zeros(1, 0, 1)}


def same_model() -> Any:
    """A random model with the settings above; all of its weights count."""
    from diffusers import AutoencoderSAME

    torch.manual_seed(0)
    model = AutoencoderSAME(
        patch_size=16,
        encoder_channels=4,
        encoder_c_mults=[4],
        encoder_strides=[4],
        encoder_transformer_depths=[3],
        latent_dim=6,
        dim_heads=8,
        decoder_sinusoidal_blocks=[2],
    )
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    model.bottleneck.running_std.fill_(1.7)
    return model.eval()


@pytest.mark.parametrize("layout", ["diffusion", "autoencoder"])
def test_stable_audio_3_as_published(tmp_path: Path, layout: str) -> None:
    theirs = same_model()
    state = published_same(theirs.state_dict())
    if layout == "diffusion":
        config, prefix, file = (
            in_a_diffusion_model(SAME),
            "pretransform.model.",
            "model.safetensors",
        )
    else:
        config, prefix, file = alone(SAME), "", "model.ckpt"
    write(tmp_path, config, with_prefix(state, prefix), file)
    model = load("same", tmp_path)
    assert (model.spec.hop, model.spec.context) == (64, (3, 3))
    x = noise(model, 30)
    with torch.inference_mode():
        latents = theirs.encode(x).latents
        decoded = theirs.decode(latents).sample
    assert torch.equal(model.encode(x), latents)
    assert torch.equal(model.decode(latents, x.shape[-1]), decoded)
    assert latents.std() > 0.01
    assert set(model.spec.identity) >= {"sha256_config", "sha256_weights"}


@pytest.mark.parametrize(
    ("family", "part", "settings", "message"),
    [
        ("same", "encoder", {"sliding_window": None, "chunk_size": 32}, "attention within chunks"),
        ("same", "decoder", {"conv_mapping": True}, "conv_mapping = True of its decoder"),
        ("same", "decoder", {"strides": [8]}, r"strides = \[8\] of its decoder"),
        ("same", "encoder", {"sliding_window": [1, 2]}, r"sliding_window = \[1, 2\]"),
        ("oobleck", "decoder", {"final_tanh": True}, "final_tanh = True of its decoder"),
        ("oobleck", "encoder", {"latent_dim": 16}, "latent_dim = 16 of its encoder"),
    ],
)
def test_what_diffusers_does_not_implement_is_an_error(
    tmp_path: Path,
    one_sentence: Callable[[BaseException], str],
    family: str,
    part: str,
    settings: Tree,
    message: str,
) -> None:
    """With the class's own settings instead, the latents would be those of another model."""
    autoencoder = json.loads(json.dumps(SAME if family == "same" else OOBLECK))
    autoencoder[part]["config"].update(settings)
    write(tmp_path, alone(autoencoder), {}, "model.ckpt")
    with pytest.raises(ModelError, match=message) as caught:
        resolve(f"{family}:{tmp_path}")
    assert one_sentence(caught.value).endswith("use another checkpoint.")
    assert isinstance(caught.value.__cause__, UnsupportedCheckpointError)


def test_a_scaled_pretransform_is_an_error(tmp_path: Path) -> None:
    config = in_a_diffusion_model(SAME)
    config["model"]["pretransform"]["scale"] = 0.5
    write(tmp_path, config, {}, "model.ckpt")
    with pytest.raises(ModelError, match=r"scale = 0\.5 of its pretransform"):
        resolve(f"same:{tmp_path}")


def test_one_family_s_checkpoint_is_an_error_for_the_other(tmp_path: Path) -> None:
    write(tmp_path, alone(SAME), published_same(same_model().state_dict()), "model.ckpt")
    with pytest.raises(ModelError, match="type = 'same' of its encoder"):
        resolve(f"oobleck:{tmp_path}")


def test_missing_weights_are_an_error(tmp_path: Path) -> None:
    state = published_same(same_model().state_dict())
    del state["decoder.layers.3.new_tokens"]
    write(tmp_path, alone(SAME), state, "model.ckpt")
    with pytest.raises(ModelError, match=r"does not load .*decoder\.blocks\.0\.new_tokens"):
        load("same", tmp_path)


def test_other_tensors_of_a_checkpoint_are_not_read(tmp_path: Path) -> None:
    """Those of the diffusion model are much larger than the autoencoder."""
    from latentmill.models.weights import read_state

    tensors = {"pretransform.model.a": torch.ones(2), "model.b": torch.zeros(3)}
    save_file(tensors, tmp_path / "x.safetensors")
    torch.save({"state_dict": tensors}, tmp_path / "x.ckpt")
    for path in tmp_path.iterdir():
        state = read_state("m", path, "state_dict", prefix="pretransform.model.")
        assert list(state) == ["pretransform.model.a"]


def test_diffusers_files_are_preferred(tiny_repos: Path, tmp_path: Path) -> None:
    """The repository of Stable Audio Open has both."""
    import shutil

    shutil.copytree(tiny_repos / "oobleck", tmp_path / "repo")
    expected = resolve(f"oobleck:{tmp_path / 'repo'}").spec.identity
    write(tmp_path / "repo", in_a_diffusion_model(OOBLECK), {}, "model.safetensors")
    assert resolve(f"oobleck:{tmp_path / 'repo'}").spec.identity == expected


def test_another_model_s_config_does_not_hide_a_checkpoint(tmp_path: Path) -> None:
    """Such as the config.json of a conditioner, or of a library's cache, at the root."""
    write(tmp_path, alone(SAME), published_same(same_model().state_dict()), "model.ckpt")
    expected = resolve(f"same:{tmp_path}").spec.identity
    (tmp_path / "config.json").write_text('{"model_type": "t5"}')
    assert resolve(f"same:{tmp_path}").spec.identity == expected
    (tmp_path / "model_config.json").unlink()
    with pytest.raises(ModelError, match="it belongs to t5"):
        resolve(f"same:{tmp_path}")
