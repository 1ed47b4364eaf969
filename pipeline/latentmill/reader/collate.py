"""Batches from samples. Importing this module registers our samples with torch's own collate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import default_collate
from torch.utils.data._utils.collate import default_collate_fn_map

from latentmill.errors import ConfigError
from latentmill.reader.field_values import FieldValue, collate_field
from latentmill.reader.sample import Sample
from latentmill.reader.stems import ContextTarget, StemSet, Triplet


def collate(samples: Sequence[Any]) -> dict[str, Any]:
    """Make a batch: a dict with the names of the samples' fields.

    Args:
        samples: At least one, all with the same number of latent channels. Shorter samples of
            `LatentDataset` and `LatentStream` are padded with silence, the origin of their store.

    Returns:
        For `LatentDataset` and `LatentStream`:
        `latents`: float32 `[B, D, T]`, in memory frame after frame as on disk; a copy to a GPU
        keeps that order, and `.contiguous()` changes it for kernels that need `[B, D, T]`.
        `mask`: bool `[B, T]`, True for frames of the item.
        `metadata`: a list of B dicts, with `seconds_start` and `seconds_total`.
        `key`: a list of B keys.
        `epoch`, `position`: lists of B numbers, which `state_after` needs.
        `fields`, if any were asked for: a dict of `FieldBatch` with `values` and `mask`.

        For `StemDataset`: the fields of the task's result, arrays as tensors `[B, ...]` and
        anything else as a list.

    Raises:
        ConfigError: There are no samples, or they cannot be in one batch.
    """
    _check(samples)
    if not isinstance(samples[0], Sample):
        return _fields(samples)
    frames = max(sample.latents.shape[1] for sample in samples)
    if len({sample.latents.shape[0] for sample in samples}) > 1:
        raise ConfigError(
            "samples with different numbers of latent channels cannot be in one batch: use stores "
            "of one model."
        )
    # [B, T, D] is the samples' order in memory, so this is a plain copy; in a DataLoader worker
    # torch copies into memory that it shares with the main process.
    latents = default_collate([torch.from_numpy(_padded(s, frames)) for s in samples])
    mask = np.zeros((len(samples), frames), np.bool_)
    for row, sample in zip(mask, samples, strict=True):
        row[: len(sample.mask)] = sample.mask
    batch = {
        "latents": latents.transpose(1, 2),
        "mask": torch.from_numpy(mask),
        "metadata": [dict(sample.metadata) for sample in samples],
        "key": [sample.key for sample in samples],
        "epoch": [sample.epoch for sample in samples],
        "position": [sample.position for sample in samples],
    }
    return batch | _fields_of([sample.fields for sample in samples])


def _fields_of(samples: Sequence[Mapping[str, FieldValue]]) -> dict[str, Any]:
    """The entry `fields` of a batch; empty if its samples have no fields."""
    names = list(samples[0])
    if any(list(one) != names for one in samples):
        raise ConfigError(
            "samples with different fields cannot be in one batch: read the same fields of all."
        )
    fields = {name: collate_field([one[name] for one in samples]) for name in names}
    return {"fields": fields} if fields else {}


def collate_tensors(samples: Sequence[Any]) -> dict[str, Any]:
    """Make a batch as `collate` does, but of tensors only, for libraries that send batches.

    `epoch` and `position` are integers `[B]`, `seconds_start` and `seconds_total` floats `[B]`;
    keys, other metadata and other strings are left out. `fields` stay a dict.

    Raises:
        ConfigError: As for `collate`.
    """
    return only_tensors(collate(samples))


def only_tensors(batch: Mapping[str, Any]) -> dict[str, Any]:
    """The batch of `collate_tensors`, from that of `collate`."""
    tensors: dict[str, Any] = {
        name: value for name, value in batch.items() if isinstance(value, torch.Tensor)
    }
    for name in ("epoch", "position"):
        if name in batch:
            tensors[name] = torch.tensor(batch[name], device="cpu")
    for name in ("seconds_start", "seconds_total"):
        if "metadata" in batch:
            seconds = [one[name] for one in batch["metadata"]]
            tensors[name] = torch.tensor(seconds, dtype=torch.float64, device="cpu")
    return tensors | ({"fields": batch["fields"]} if "fields" in batch else {})


def _check(samples: object) -> None:
    single = isinstance(samples, Sample) or hasattr(samples, "_asdict")
    if single or not isinstance(samples, Sequence):
        raise ConfigError(
            "collate needs a list of samples, but got a single one: give the DataLoader a "
            "batch_size or a batch_sampler (and, with a batch_sampler, give Ray's "
            "prepare_data_loader add_dist_sampler=False)."
        )
    if not samples:
        raise ConfigError("collate got no samples: give it at least one.")
    if len({type(sample) for sample in samples}) > 1:
        raise ConfigError("collate got samples of different types: use one dataset per batch.")


def _fields(samples: Sequence[Any]) -> dict[str, Any]:
    """A batch of a task's results: named tuples, mappings, or anything that torch can collate."""
    first = samples[0]
    if isinstance(first, Mapping):
        rows = [dict(sample) for sample in samples]
    elif hasattr(first, "_asdict"):
        rows = [sample._asdict() for sample in samples]
    else:
        batch: dict[str, Any] = default_collate(list(samples))
        return batch
    ours = isinstance(first, ContextTarget | Triplet)
    values = [row.pop("fields") for row in rows] if _has_fields(rows, ours) else [{}]
    batch = {name: _collated([row[name] for row in rows]) for name in rows[0]}
    return batch | _fields_of(values)


def _has_fields(rows: Sequence[Mapping[str, Any]], ours: bool) -> bool:
    """Whether `fields` are those of a store, and not something else of the user's task.

    If all are empty, they are those of a store only in results of our tasks (`ours`).
    """
    fields = [row.get("fields") for row in rows]
    mappings = [one for one in fields if isinstance(one, Mapping)]
    if len(mappings) < len(fields):
        return False
    values = [value for one in mappings for value in one.values()]
    return all(isinstance(value, FieldValue) for value in values) and (bool(values) or ours)


def _collated(values: list[Any]) -> Any:
    if isinstance(values[0], np.ndarray | torch.Tensor):
        with torch.device("cpu"):  # not torch's default device
            return default_collate(values)
    return [dict(value) if isinstance(value, Mapping) else value for value in values]


def _padded(sample: Sample, frames: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    """The latent `[frames, D]`, padded with silence."""
    latent = sample.latents
    have = latent.shape[1]
    if have < frames:
        if sample.origin is None:
            raise ConfigError(
                f"sample {sample.key} is shorter than others in its batch, and its store's silence "
                "is not known: set crop, or keep `origin` if a transform creates a new Sample."
            )
        silence = sample.origin.crop(frames, have, frames - have)
        latent = np.concatenate([latent, silence], axis=1, dtype=np.float32)
    return latent.T


def _for_torch(batch: Sequence[Any], *, collate_fn_map: object = None) -> dict[str, Any]:
    return collate(batch)


# So a DataLoader without `collate_fn` yields the same batches.
default_collate_fn_map.update(dict.fromkeys((Sample, ContextTarget, Triplet, StemSet), _for_torch))
