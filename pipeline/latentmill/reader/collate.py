"""A batch from samples. Importing this makes torch's own collate do the same with our samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import default_collate
from torch.utils.data._utils.collate import default_collate_fn_map

from latentmill.errors import ConfigError
from latentmill.reader.sample import Sample
from latentmill.reader.stems import ContextTarget, StemSet, Triplet


def collate(samples: Sequence[Any]) -> dict[str, Any]:
    """Make a batch: a dict with the names of the samples' fields.

    Args:
        samples: At least one, all of the same latent channels. Shorter ones of `LatentDataset` and
            `LatentStream` are continued by silence, their store's origin.

    Returns:
        Of `LatentDataset` and `LatentStream`:
        `latents`: float32 `[B, D, T]`, in memory frame after frame as on disk (`.contiguous()`
        where a kernel wants another order; a copy to a GPU keeps it).
        `mask`: bool `[B, T]`, True where a frame is the item's.
        `metadata`: a list of B dicts, with `seconds_start` and `seconds_total`.
        `key`: a list of B keys.
        `epoch`, `position`: lists of B numbers, which `state_after` needs.

        Of `StemDataset`: each of the task's fields, arrays as tensors `[B, ...]`, anything else
        as a list.

    Raises:
        ConfigError: There are no samples, or they do not fit together.
    """
    _check(samples)
    if not isinstance(samples[0], Sample):
        return _fields(samples)
    frames = max(sample.latents.shape[1] for sample in samples)
    if len({sample.latents.shape[0] for sample in samples}) > 1:
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


def collate_tensors(samples: Sequence[Any]) -> dict[str, torch.Tensor]:
    """Make a batch as `collate` does, of tensors only, for libraries that send batches around.

    `epoch` and `position` are integers `[B]`, `seconds_start` and `seconds_total` floats `[B]`;
    keys, other metadata and other strings are left out.

    Raises:
        ConfigError: As `collate`.
    """
    batch = collate(samples)
    tensors = {name: value for name, value in batch.items() if isinstance(value, torch.Tensor)}
    tensors |= {name: torch.tensor(batch[name]) for name in ("epoch", "position") if name in batch}
    for name in ("seconds_start", "seconds_total"):
        if "metadata" in batch:
            seconds = [one[name] for one in batch["metadata"]]
            tensors[name] = torch.tensor(seconds, dtype=torch.float64)
    return tensors


def _check(samples: object) -> None:
    single = isinstance(samples, Sample) or hasattr(samples, "_asdict")
    if single or not isinstance(samples, Sequence):
        raise ConfigError(
            "collate needs a list of samples, but got a single one: give the DataLoader a "
            "batch_size or a batch_sampler (with Ray's prepare_data_loader and a batch_sampler use "
            "add_dist_sampler=False)."
        )
    if not samples:
        raise ConfigError("collate got no samples: a batch needs at least one.")
    if len({type(sample) for sample in samples}) > 1:
        raise ConfigError("collate got samples of different types: they cannot be one batch.")


def _fields(samples: Sequence[Any]) -> dict[str, Any]:
    """A batch of a task's samples: named tuples, mappings, or what torch can collate."""
    first = samples[0]
    if isinstance(first, Mapping):
        rows = [dict(sample) for sample in samples]
    elif hasattr(first, "_asdict"):
        rows = [sample._asdict() for sample in samples]
    else:
        batch: dict[str, Any] = default_collate(list(samples))
        return batch
    return {name: _joined([row[name] for row in rows]) for name in rows[0]}


def _joined(values: list[Any]) -> Any:
    if isinstance(values[0], np.ndarray | torch.Tensor):
        return default_collate(values)
    return [dict(value) if isinstance(value, Mapping) else value for value in values]


def _of_length(sample: Sample, frames: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    """The latent `[frames, D]`, continued by silence."""
    latent = sample.latents
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


def _for_torch(batch: Sequence[Any], *, collate_fn_map: object = None) -> dict[str, Any]:
    return collate(batch)


# A DataLoader without `collate_fn` gives the same batches.
default_collate_fn_map.update(dict.fromkeys((Sample, ContextTarget, Triplet, StemSet), _for_torch))
