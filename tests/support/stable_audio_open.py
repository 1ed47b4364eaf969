"""The VAE of Stable Audio Open as stable-audio-tools has it: its layers, in its order."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

Tree = dict[str, Any]


def write(folder: Path, config: Tree, state: dict[str, Tensor], file: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model_config.json").write_text(json.dumps(config))
    if file.endswith(".safetensors"):
        save_file({name: value.contiguous() for name, value in state.items()}, folder / file)
    else:
        torch.save({"state_dict": state}, folder / file)


def alone(autoencoder: Tree) -> Tree:
    return {"model_type": "autoencoder", "sample_rate": 44100, "model": autoencoder}


class Snake(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.alpha = nn.Parameter(0.3 * torch.randn(channels))
        self.beta = nn.Parameter(0.3 * torch.randn(channels))

    def forward(self, x: Tensor) -> Tensor:
        alpha, beta = self.alpha.exp()[:, None], self.beta.exp()[:, None]
        return x + torch.sin(alpha * x) ** 2 / (beta + 1e-9)


class Layers(nn.Module):
    """Layers in a list, as all parts of the package have them; `skip` adds the input."""

    def __init__(self, *layers: nn.Module, skip: bool = False) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)
        self.skip = skip

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x) + (x if self.skip else 0)


def conv(inputs: int, outputs: int, taps: int, **options: Any) -> nn.Module:
    return weight_norm(nn.Conv1d(inputs, outputs, taps, **options))


def unit(channels: int, dilation: int) -> Layers:
    wide = conv(channels, channels, 7, dilation=dilation, padding=3 * dilation)
    return Layers(Snake(channels), wide, Snake(channels), conv(channels, channels, 1), skip=True)


def open_audio_encoder(channels: int, widths: list[int], strides: list[int]) -> Layers:
    blocks = [
        Layers(
            *(unit(a, dilation) for dilation in (1, 3, 9)),
            Snake(a),
            conv(a, b, 2 * stride, stride=stride, padding=math.ceil(stride / 2)),
        )
        for a, b, stride in zip(widths, widths[1:], strides, strict=False)
    ]
    first, last = conv(channels, widths[0], 7, padding=3), conv(widths[-1], widths[0], 3, padding=1)
    return Layers(first, *blocks, Snake(widths[-1]), last)


def open_audio_decoder(latent: int, widths: list[int], strides: list[int], out: int) -> Layers:
    blocks = [
        Layers(
            Snake(a),
            weight_norm(
                nn.ConvTranspose1d(a, b, 2 * stride, stride, padding=math.ceil(stride / 2))
            ),
            *(unit(b, dilation) for dilation in (1, 3, 9)),
        )
        for a, b, stride in zip(widths[::-1], widths[::-1][1:], strides[::-1], strict=False)
    ]
    last = conv(widths[0], out, 7, padding=3, bias=False)
    return Layers(
        conv(latent, widths[-1], 7, padding=3), *blocks, Snake(widths[0]), last, nn.Identity()
    )


OOBLECK: Tree = {
    "encoder": {
        "type": "oobleck",
        "config": {
            "in_channels": 2,
            "channels": 8,
            "c_mults": [1, 2],
            "strides": [2, 4],
            "latent_dim": 8,
            "use_snake": True,
        },
    },
    "decoder": {
        "type": "oobleck",
        "config": {
            "out_channels": 2,
            "channels": 8,
            "c_mults": [1, 2],
            "strides": [2, 4],
            "latent_dim": 4,
            "use_snake": True,
            "final_tanh": False,
        },
    },
    "bottleneck": {"type": "vae"},
    "latent_dim": 4,
    "downsampling_ratio": 8,
    "io_channels": 2,
}


def open_audio_networks() -> tuple[Layers, Layers, dict[str, Tensor]]:
    """Encoder and decoder of `OOBLECK` with random weights, and these as in a checkpoint."""
    torch.manual_seed(0)
    encoder = open_audio_encoder(2, [8, 8, 16], [2, 4])
    decoder = open_audio_decoder(4, [8, 8, 16], [2, 4], 2)
    state = {
        f"{part}.{name}": value
        for part, network in (("encoder", encoder), ("decoder", decoder))
        for name, value in network.state_dict().items()
    }
    return encoder, decoder, state
