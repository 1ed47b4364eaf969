"""A small convolutional autoencoder, which a CPU trains in minutes; see `latentmill.training`.

The encoder lowers the rate stage by stage: a strided convolution, then residual units with dilated
convolutions, as in SoundStream (N. Zeghidour and others, arXiv 2107.03312). The decoder is its
mirror image. Only the residual units are nonlinear. They normalise each frame by itself, so a
latent frame depends on a bounded stretch of audio.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from torch import Tensor, nn

from latentmill.models.base import Context, ModelSpec
from latentmill.models.families.codec import codec_spec

DILATIONS = (1, 3)
KERNEL = 3
MAX_HOP = 65536
MAX_KERNEL = 2**28  # weights of one convolution
SCALE = 10.0  # music has an RMS of about 0.1, and networks learn best from values of about 1


class ConvSettings(BaseModel):
    """The shape of the network."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    sample_rate: int = Field(44100, ge=1000, le=768_000, description="Hz.")
    channels: int = Field(1, ge=1, le=8, description="Audio channels.")
    strides: tuple[int, ...] = Field(
        (16, 8, 4),
        min_length=1,
        max_length=8,
        description="Even strides of the stages; the hop is their product.",
    )
    width: int = Field(64, ge=1, le=2048, description="Channels of the first stage.")
    max_width: int = Field(
        256, ge=1, le=2048, description="Each stage doubles the channels up to this."
    )
    latent_channels: int = Field(64, ge=1, le=2048, description="Channels of a latent.")
    norm: bool = Field(True, description="Normalise the channels before each residual unit.")
    posterior: bool = Field(
        True, description="Draw latents from a posterior in training, as a VAE; encode to its mean."
    )

    @field_validator("strides")
    @classmethod
    def _even(cls, strides: tuple[int, ...]) -> tuple[int, ...]:
        if any(stride < 2 or stride % 2 for stride in strides):
            raise ValueError("strides must be even and at least 2")
        if math.prod(strides) > MAX_HOP:
            raise ValueError(f"the product of strides must be at most {MAX_HOP}")
        return strides

    @model_validator(mode="after")
    def _size(self) -> ConvSettings:
        pairs = zip(pairwise((self.channels, *self.widths)), self.strides, strict=True)
        largest = max(before * after * 2 * stride for (before, after), stride in pairs)
        if largest > MAX_KERNEL:
            raise ValueError(
                f"a layer would have {largest} weights, more than {MAX_KERNEL}: lower width, "
                "max_width or strides"
            )
        return self

    @property
    def hop(self) -> int:
        """Samples per latent frame."""
        return math.prod(self.strides)

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels after each stage."""
        return tuple(min(self.max_width, self.width * 2**n) for n in range(len(self.strides)))


class ConvAutoencoder(nn.Module):
    """Encodes audio `[B, C, T]`, T a multiple of the hop, to `[B, D, T / hop]`, and decodes it."""

    def __init__(self, settings: ConvSettings) -> None:
        super().__init__()
        self.settings = settings
        widths = (settings.channels, *settings.widths)
        down: list[nn.Module] = []
        up: list[nn.Module] = []
        for (before, after), stride in zip(pairwise(widths), settings.strides, strict=True):
            shape: dict[str, Any] = {
                "kernel_size": 2 * stride,
                "stride": stride,
                "padding": stride // 2,
            }
            down += [nn.Conv1d(before, after, **shape), *_units(after, settings.norm)]
            up = [
                *_units(after, settings.norm),
                nn.ConvTranspose1d(after, before, **shape),
                *up,
            ]
        ends: dict[str, Any] = {"kernel_size": KERNEL, "padding": KERNEL // 2}
        given = settings.latent_channels * (2 if settings.posterior else 1)
        self.encoder = nn.Sequential(*down, nn.Conv1d(widths[-1], given, **ends))
        self.decoder = nn.Sequential(nn.Conv1d(settings.latent_channels, widths[-1], **ends), *up)

    def encode(self, audio: Tensor) -> Tensor:
        return self.posterior(audio)[:, : self.settings.latent_channels]

    def posterior(self, audio: Tensor) -> Tensor:
        """The mean, and below it, with `settings.posterior`, the scale before softplus."""
        encoded: Tensor = self.encoder(SCALE * audio)
        return encoded

    def decode(self, latents: Tensor) -> Tensor:
        audio: Tensor = self.decoder(latents)
        return audio / SCALE


class _Unit(nn.Module):
    """A residual unit: a dilated convolution and a pointwise one. It starts as the identity."""

    def __init__(self, width: int, dilation: int, norm: bool) -> None:
        super().__init__()
        last = nn.Conv1d(width, width, 1)
        for parameter in last.parameters():
            nn.init.zeros_(parameter)
        self.layers = nn.Sequential(
            _Norm(width) if norm else nn.Identity(),
            nn.ELU(),
            nn.Conv1d(width, width, KERNEL, padding=dilation, dilation=dilation),
            nn.ELU(),
            last,
        )

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.layers(x)
        return y


class _Norm(nn.LayerNorm):
    """Normalises the channels of each frame of `[B, C, T]`."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.transpose(1, 2)).transpose(1, 2)


def _units(width: int, norm: bool) -> list[nn.Module]:
    return [_Unit(width, dilation, norm) for dilation in DILATIONS]


def conv_spec(settings: ConvSettings) -> ModelSpec:
    """The spec of a network, without its identity."""
    reach = encoder_context(settings.strides)
    return codec_spec(
        "conv",
        sample_rate=settings.sample_rate,
        channels=settings.channels,
        latent_channels=settings.latent_channels,
        hop=settings.hop,
        context=Context(reach, reach),
    )


def encoder_context(strides: tuple[int, ...]) -> int:
    """Number of latent frames on each side that a frame depends on.

    A strided convolution reaches half a stride beyond its frame, a unit as far as its dilation, the
    last convolution one frame.
    """
    reach, rate = 0, 1  # input samples; samples per step at this depth
    for stride in strides:
        reach += rate * (stride // 2)
        rate *= stride
        reach += rate * sum(DILATIONS) * (KERNEL // 2)
    reach += rate * (KERNEL // 2)
    return math.ceil(reach / rate)
