"""Encoding one item as a run does it: cut into chunks, encoded one by one, stitched."""

from __future__ import annotations

import numpy as np
import torch

from latentmill.encoding.chunks import Chunker, Chunking, Stitcher
from latentmill.models.base import Autoencoder


def encode_chunked(model: Autoencoder, audio: torch.Tensor, chunking: Chunking) -> torch.Tensor:
    """Encode `[C, T]` of any length to the stitched latent `[D, Z]`."""
    chunker = Chunker(model.spec, chunking)
    stitcher = Stitcher(chunking, np.dtype(np.float32))
    for chunk in [*chunker.push(audio.numpy()), *chunker.finish()]:
        latent = model.encode(torch.from_numpy(chunk.audio)[None])[0]
        stitcher.add(chunk.frame, latent.numpy())
    return torch.from_numpy(np.ascontiguousarray(stitcher.finish()))


def encode_whole(model: Autoencoder, audio: torch.Tensor) -> torch.Tensor:
    """Encode `[C, T]` of any length in one piece, filled up with zeros to a length it takes."""
    missing = model.spec.padded(audio.shape[1]) - audio.shape[1]
    return model.encode(torch.nn.functional.pad(audio, (0, missing))[None])[0]
