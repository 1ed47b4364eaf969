"""An MDCT that cannot decode short latents, for `python:support.failing_decoder:build`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from latentmill.models.base import Autoencoder
from support.mdct_around import Around, small_mdct

SHORTEST = 150  # frames: 0.87 s


@dataclass(frozen=True)
class Handle(Around):
    """The handle."""

    def load(self, device: str) -> Autoencoder:
        return _Model(self.inner.load(device))


class _Model:
    def __init__(self, inner: Autoencoder) -> None:
        self._inner, self.spec, self.encode = inner, inner.spec, inner.encode

    def decode(
        self,
        latents: torch.Tensor,
        num_samples: int,
        *,
        seed: int = 0,
        positions: Sequence[int] | None = None,
    ) -> torch.Tensor:
        if latents.shape[-1] < SHORTEST:
            raise RuntimeError("Kernel size can't be greater than actual input size")
        return self._inner.decode(latents, num_samples, seed=seed, positions=positions)


def build() -> Handle:
    """The model."""
    return Handle(small_mdct())
