"""Making the batches of a `Loader`, in any process."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import torch

from latentmill.reader.buffers import Packed
from latentmill.reader.collate import collate, collate_tensors, only_tensors
from latentmill.reader.corpus import Corpus, StoreSamples
from latentmill.reader.draws import Request, Requested
from latentmill.reader.order import Ints

Collate = Callable[[Sequence[Any]], Any]


class BatchDataset(Protocol):
    """A dataset that reads a batch of (epoch, position, number)."""

    def __getitems__(self, numbers: Sequence[Request]) -> Sequence[Any]: ...


class BatchBuilder:
    """Makes batches and packs them for a buffer.

    Crops without transforms are read into the buffer itself. Any other batch is made of samples by
    `collate_fn`, as in a DataLoader, and its tensors are copied into the buffer.

    Args:
        source: The dataset of the samples, or the corpus of a `LatentDataset` or `LatentStream`.
        collate_fn: Makes a batch of samples.
        dtype: What float32 tensors are stored as.
    """

    def __init__(
        self, source: Corpus | BatchDataset, collate_fn: Collate, dtype: torch.dtype
    ) -> None:
        self._source, self._collate, self._dtype = source, collate_fn, dtype

    @property
    def remote(self) -> bool:
        """Whether a store is not on a local disk."""
        source: Any = self._source
        stores = [one.store for one in source.stores] if isinstance(source, Corpus) else []
        store = getattr(source, "store", None)
        return not all(one.storage.local for one in [*stores, *([store] if store else [])])

    def build(self, requested: Requested) -> Packed:
        """Make a batch. It may be read only when it is written into a buffer."""
        source, (epoch, positions, numbers) = self._source, requested
        if not isinstance(source, Corpus):
            pairs = zip(positions.tolist(), numbers.tolist(), strict=True)
            samples = source.__getitems__([(epoch, *pair) for pair in pairs])
            return Packed(self._collate(samples), self._dtype)
        if source.direct and self._collate in (collate, collate_tensors):
            return self._crops(source, requested)
        read = source.read(*source.stores_of(numbers), epoch, positions)
        return Packed(self._collate(list(read)), self._dtype)

    def _crops(self, corpus: Corpus, requested: Requested) -> Packed:
        """The batch that `collate` makes, without samples."""
        frames = corpus.reading.crop
        assert frames is not None
        crops = _Crops(corpus, requested)
        count, described = len(requested.numbers), crops.describe()
        channels = corpus.stores[0].crops.channels
        batch = {
            "latents": torch.empty(count, frames, channels, device="meta").transpose(1, 2),
            "mask": torch.from_numpy(np.arange(frames) < crops.left()[:, None]),
            "metadata": [metadata for _, metadata in described],
            "key": [key for key, _ in described],
            "epoch": [requested.epoch] * count,
            "position": requested.positions.tolist(),
        }
        tensors_only = self._collate is collate_tensors
        return Packed(only_tensors(batch) if tensors_only else batch, self._dtype, crops.fill)


class _Crops:
    """The crops of a batch, by store: their places in the batch, rows and first frames."""

    def __init__(self, corpus: Corpus, requested: Requested) -> None:
        of_store, samples = corpus.stores_of(requested.numbers)
        self._count = len(samples)
        self._parts: list[tuple[Ints, StoreSamples, Ints, Ints]] = []
        for number in np.unique(of_store).tolist():
            here, store = np.flatnonzero(of_store == number), corpus.stores[number]
            found = store.locate(samples[here], requested.epoch, requested.positions[here])
            self._parts.append((here, store, *found))

    def describe(self) -> list[tuple[str, dict[str, Any]]]:
        """Key and metadata of each crop."""
        described: list[Any] = [None] * self._count
        for here, store, rows, starts in self._parts:
            for place, one in zip(here.tolist(), store.describe(rows, starts), strict=True):
                described[place] = one
        return described

    def left(self) -> Ints:
        """Number of frames from the start of each crop to the end of its item."""
        left = np.empty(self._count, np.int64)
        for here, store, rows, starts in self._parts:
            left[here] = store.crops.frames[rows] - starts
        return left

    def fill(self, tensors: list[torch.Tensor]) -> None:
        """Read the crops into a tensor `[B, D, T]`, whose order in memory is `[B, T, D]`."""
        block = tensors[0].transpose(1, 2)
        for here, store, rows, starts in self._parts:
            if len(self._parts) == 1:
                store.crops.read_into(rows, starts, block)
                return
            part = torch.empty(len(here), *block.shape[1:], dtype=block.dtype)
            store.crops.read_into(rows, starts, part)
            block[torch.from_numpy(here)] = part
