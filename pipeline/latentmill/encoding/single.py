"""Encodes one item by itself, chunked as a run does it or in one piece, to compare the two."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import numpy as np
import torch

from latentmill.encoding.chunks import Chunker, Chunking, Stitcher
from latentmill.models.base import Autoencoder, StatefulAutoencoder

if TYPE_CHECKING:
    from latentmill.models.base import State


def encode_chunked(model: Autoencoder, audio: torch.Tensor, chunking: Chunking) -> torch.Tensor:
    """Encode `[C, T]` of any length chunk by chunk to the stitched latent `[D, Z]`, float32."""
    chunker = Chunker(model.spec, chunking)
    stitcher = Stitcher(chunking, np.dtype(np.float32))
    states: list[State | None] = [None]
    for chunk in [*chunker.push(audio.numpy()), *chunker.finish()]:
        batch = torch.from_numpy(chunk.audio)[None]
        if chunking.stitch == "state":
            latents, after = cast(StatefulAutoencoder, model).encode_step(batch, states)
            states = [*after]
        else:
            latents = model.encode(batch)
        stitcher.add(chunk.frame, latents[0].cpu().numpy())
    return torch.from_numpy(np.ascontiguousarray(stitcher.finish()))


def encode_whole(model: Autoencoder, audio: torch.Tensor) -> torch.Tensor:
    """Encode `[C, T]` of any length in one piece, padded with zeros to a length it accepts."""
    missing = model.spec.padded(audio.shape[1]) - audio.shape[1]
    return model.encode(torch.nn.functional.pad(audio, (0, missing))[None])[0]
