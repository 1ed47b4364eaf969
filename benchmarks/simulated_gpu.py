"""A simulated model that sleeps instead of using the CPU, for `python:simulated_gpu:build`."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from latentmill.models.base import Autoencoder, ModelSpec
from latentmill.models.families import mdct


@dataclass(frozen=True)
class Handle:
    """A model whose latents are zeros in 64 channels, returned after a delay."""

    x_real_time: float
    seconds: float
    spec: ModelSpec

    def load(self, device: str) -> Autoencoder:
        return Model(self)


class Model:
    def __init__(self, handle: Handle) -> None:
        self._handle = handle
        self.spec = handle.spec

    def encode(self, audio: torch.Tensor) -> torch.Tensor:
        batch, _, samples = audio.shape
        seconds = self._handle.seconds
        if self._handle.x_real_time:
            seconds += batch * samples / self.spec.sample_rate / self._handle.x_real_time
        if seconds:
            time.sleep(seconds)
        shape = batch, self.spec.latent_channels, self.spec.frames(samples)
        return torch.zeros(()).expand(shape)  # one value in memory

    def decode(
        self,
        latents: torch.Tensor,
        num_samples: int,
        *,
        seed: int = 0,
        positions: Sequence[int] | None = None,
    ) -> torch.Tensor:
        return torch.zeros(len(latents), self.spec.channels, num_samples)


def build(*, x_real_time: float = 0.0, seconds: float = 0.0, hop: int = 2048) -> Handle:
    """Make a model that sleeps `seconds` per batch plus the time that its speed implies.

    Without them, it costs nothing. With a hop of 4096, its latents have the shape of lin-cae's.
    """
    spec = replace(mdct.build(hop=hop).spec, latent_channels=64)
    return Handle(x_real_time, seconds, spec)
