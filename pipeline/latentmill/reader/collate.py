"""A batch from samples."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import default_collate

from latentmill.errors import ConfigError
from latentmill.reader.sample import Sample


def collate(samples: Sequence[Sample]) -> dict[str, Any]:
    """Make a batch; shorter samples are continued by silence, their store's origin.

    Args:
        samples: At least one, all of the same latent channels.

    Returns:
        `latents`: float32 `[B, D, T]`, in memory frame after frame as on disk (`.contiguous()`
        where a kernel wants another order; a copy to a GPU keeps it).
        `mask`: bool `[B, T]`, True where a frame is the item's.
        `metadata`: a list of B dicts, with `seconds_start` and `seconds_total`.
        `key`: a list of B keys.
        `epoch`, `position`: lists of B numbers, what `state_after` goes by.

    Raises:
        ConfigError: Samples of different lengths do not know their store's silence, or they have
            different channels.
    """
    frames = max(sample.latent.shape[1] for sample in samples)
    if len({sample.latent.shape[0] for sample in samples}) > 1:
        raise ConfigError("Samples of different latent channels cannot be one batch.")
    # [B, T, D]: the samples are transposed views of that order, which makes this a plain copy; in
    # a DataLoader's worker torch makes it in memory that the main process shares.
    latents = default_collate([torch.from_numpy(_of_length(s, frames)) for s in samples])
    mask = np.zeros((len(samples), frames), np.bool_)
    for row, sample in zip(mask, samples, strict=True):
        row[: len(sample.mask)] = sample.mask
    return {
        "latents": latents.transpose(1, 2),
        "mask": torch.from_numpy(mask),
        "metadata": [dict(sample.metadata) for sample in samples],
        "key": [sample.key for sample in samples],
        "epoch": [sample.epoch for sample in samples],
        "position": [sample.position for sample in samples],
    }


def _of_length(sample: Sample, frames: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    """The latent `[frames, D]`, continued by silence."""
    latent = sample.latent
    have = latent.shape[1]
    if have < frames:
        if sample.origin is None:
            raise ConfigError(
                f"{sample.key} is shorter than others of its batch and its store's silence is not "
                "known: set crop, or keep `origin` where a transform makes a new Sample."
            )
        silence = sample.origin.crop(frames, have, frames - have)
        latent = np.concatenate([latent, silence], axis=1, dtype=np.float32)
    return latent.T
