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
from latentmill.reader.field_crops import Located
from latentmill.reader.field_values import FieldBatch
from latentmill.reader.order import Ints
from latentmill.reader.sample import StoredMetadata

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
        latents = torch.empty(count, frames, channels, dtype=torch.float32, device="meta")
        batch = {
            "latents": latents.transpose(1, 2),
            "mask": torch.from_numpy(np.arange(frames) < crops.left()[:, None]),
            "metadata": [metadata.parsed() for _, metadata in described],
            "key": [key for key, _ in described],
            "epoch": [requested.epoch] * count,
            "position": requested.positions.tolist(),
            **crops.empty_fields(),
        }
        tensors_only = self._collate is collate_tensors
        return Packed(only_tensors(batch) if tensors_only else batch, self._dtype, crops.fill)


class _Crops:
    """The crops of a batch, by store: their places in the batch, rows and first frames."""

    def __init__(self, corpus: Corpus, requested: Requested) -> None:
        of_store, samples = corpus.stores_of(requested.numbers)
        self._count = len(samples)
        self._parts: list[tuple[Ints, StoreSamples, Ints, Ints]] = []
        self._fields: list[list[Located]] = []  # of each part
        for number in np.unique(of_store).tolist():
            here, store = np.flatnonzero(of_store == number), corpus.stores[number]
            found = store.locate(samples[here], requested.epoch, requested.positions[here])
            self._parts.append((here, store, *found))
            self._fields.append(store.fields.locate(*found, corpus.reading.crop))

    def describe(self) -> list[tuple[str, StoredMetadata]]:
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

    def empty_fields(self) -> dict[str, Any]:
        """The entry `fields` of the batch, with values on the `meta` device."""
        fields = {}
        for parts in zip(*self._fields, strict=True):
            form, dtype = parts[0].reader.form, parts[0].reader.dtype
            length = max(part.length for part in parts)
            have = np.empty(self._count, np.int64)
            for (here, *_), part in zip(self._parts, parts, strict=True):
                have[here] = part.have
            shape = self._count, length, parts[0].reader.channels
            values = form.arranged(torch.empty(shape, dtype=dtype, device="meta"))
            mask = torch.from_numpy(np.arange(length) < have[:, None])
            fields[parts[0].reader.name] = FieldBatch(values, form.masked(mask))
        return {"fields": fields} if fields else {}

    def fill(self, tensors: list[torch.Tensor]) -> None:
        """Read the crops into tensors: the latents `[B, D, T]`, then the values of the fields.

        Their order in memory is `[B, T, D]`.
        """
        latents, *values = tensors
        forms = [one.reader.form for one in self._fields[0]] if self._fields else []
        blocks = [latents.transpose(1, 2)]
        blocks += [form.block(one) for form, one in zip(forms, values, strict=True)]
        for (here, store, rows, starts), fields in zip(self._parts, self._fields, strict=True):
            alone = len(self._parts) == 1
            targets = blocks
            if not alone:
                targets = [one.new_empty(len(here), *one.shape[1:]) for one in blocks]
            also = [one.request(target) for one, target in zip(fields, targets[1:], strict=True)]
            store.crops.read_into(rows, starts, targets[0], also)
            if not alone:
                for block, target in zip(blocks, targets, strict=True):
                    block[torch.from_numpy(here)] = target
