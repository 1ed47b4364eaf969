"""A model on a GPU whose memory takes only some elements at once; the memory is only pretended."""

from __future__ import annotations

from typing import Any

import torch

from latentmill.models.base import Autoencoder


class SmallMemory:
    """Runs a model, and is out of memory for batches of more than `fits` elements."""

    def __init__(self, model: Autoencoder, fits: int) -> None:
        self._model, self.fits, self.spec = model, fits, model.spec
        self.sizes: list[int] = []

    def encode(self, audio: torch.Tensor) -> torch.Tensor:
        self._allocate(len(audio))
        return self._model.encode(audio)

    def decode(self, latents: torch.Tensor, samples: int, **options: Any) -> torch.Tensor:
        self._allocate(len(latents))
        return self._model.decode(latents, samples, **options)

    def _allocate(self, size: int) -> None:
        self.sizes.append(size)
        if size > self.fits:
            raise torch.OutOfMemoryError("CUDA out of memory.")
