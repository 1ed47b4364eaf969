"""An MDCT of which one channel saturates."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from latentmill.models.base import Autoencoder
from latentmill.models.families import mdct
from support.mdct_around import Around

CHANNEL, BOUND = 5, 0.02


@dataclass(frozen=True)
class Saturated(Around):
    """The handle."""

    def load(self, device: str) -> Autoencoder:
        return _Model(self.inner.load(device))


class _Model:
    def __init__(self, inner: Autoencoder) -> None:
        self._inner, self.spec, self.decode = inner, inner.spec, inner.decode

    def encode(self, audio: torch.Tensor) -> torch.Tensor:
        latents = self._inner.encode(audio).clone()
        latents[:, CHANNEL] = latents[:, CHANNEL].clamp(-BOUND, BOUND)
        return latents


def build(hop: int = 256, sample_rate: int = 22050) -> Saturated:
    return Saturated(mdct.build(hop=hop, sample_rate=sample_rate))
