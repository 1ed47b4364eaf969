"""A model whose latents are the number of chunks in their batch: they show how it was packed."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from latentmill.models.base import Context, ModelSpec

HOP = 8


class BatchModel:
    """Its own handle: it has no weights."""

    spec = ModelSpec(
        name="batch",
        sample_rate=44100,
        channels=1,
        latent_channels=1,
        hop=HOP,
        overhang=0,
        sample_multiple=HOP,
        min_samples=HOP,
        context=Context(0, 0),
        stitch="trim",
        chunk_frames=20,
        overlap_frames=0,
        batch_size={"cpu": 2, "cuda": 2},
        scale_factor=1.0,
        stochastic_decoder=False,
        identity={"version": 1},
    )

    def load(self, device: str) -> BatchModel:
        return self

    def encode(self, audio: torch.Tensor) -> torch.Tensor:
        return torch.full((len(audio), 1, audio.shape[2] // HOP), float(len(audio)))

    def decode(
        self,
        latents: torch.Tensor,
        num_samples: int,
        *,
        seed: int = 0,
        positions: Sequence[int] | None = None,
    ) -> torch.Tensor:
        return latents.repeat_interleave(HOP, -1)[..., :num_samples]
