"""An MDCT whose latents of loud audio are not finite, for `python:support.picky_model:build`."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from latentmill.models.base import Autoencoder
from support.mdct_around import Around, small_mdct


@dataclass(frozen=True)
class Handle(Around):
    """The handle."""

    def load(self, device: str) -> Autoencoder:
        return _Model(self.inner.load(device))


class _Model:
    def __init__(self, inner: Autoencoder) -> None:
        self._inner, self.spec, self.decode = inner, inner.spec, inner.decode

    def encode(self, audio: torch.Tensor) -> torch.Tensor:
        latents = self._inner.encode(audio)
        loud = audio.abs().amax(dim=(1, 2)) > 0.9  # [B]
        return torch.where(loud[:, None, None], torch.nan, latents)


def build() -> Handle:
    """The model."""
    return Handle(small_mdct())
