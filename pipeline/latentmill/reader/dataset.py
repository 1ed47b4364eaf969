"""The map-style dataset."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

import numpy as np
from torch.utils.data import Dataset

import latentmill.reader.collate  # noqa: F401  a loader without collate_fn uses it too
from latentmill.reader.corpus import Corpus, Mode, Reading, Stores
from latentmill.reader.draws import Draws, Request
from latentmill.reader.fields import Where
from latentmill.reader.order import Ints
from latentmill.reader.sample import Sample, Transform
from latentmill.text.shown import Shown


class LatentDataset(Shown, Dataset[Sample]):
    """Samples of one or several stores by number: store after store, as they lie in the shards.

    For `torch.utils.data.DataLoader`, with `collate_fn=latentmill.collate`. A batch is read at
    once (`__getitems__`): one positioned read for each local crop, one round of requests for a
    remote store. Picklable and small; may be forked.

    Args:
        stores: A store or several, open or by path or URL; all of one model.
        crop: Frames of a sample; None: whole items.
        mode: Where crops are taken: at `random` (a function of seed, epoch and number), from the
            `start`, or an item's `windows` one after the other, each a sample of its own. What an
            item lacks is silence, and False in the mask.
        seed: Of the random crops, and of the transforms.
        where: Which records: a condition, a function or a pyarrow expression; see `select` in
            `reader/fields.py`.
        metadata: Whether to read the items' own metadata.
        transforms: Applied to every sample, in this order.
        cache: A folder for a local cache of stores that are not local.
        cache_gib: The most that may lie there, GiB.

    Raises:
        ConfigError: The stores cannot be mixed or cropped, or an option does not fit.
        StoreError: There is no store, or it is empty.
    """

    def __init__(
        self,
        stores: Stores,
        *,
        crop: int | None = None,
        mode: Mode = "random",
        seed: int = 0,
        where: Where | None = None,
        metadata: bool = True,
        transforms: Sequence[Transform] = (),
        cache: str | os.PathLike[str] | None = None,
        cache_gib: float = 50.0,
    ) -> None:
        reading = Reading(crop, mode, seed, metadata, tuple(transforms))
        self.corpus = Corpus(stores, reading, where=where, cache=cache, cache_gib=cache_gib)
        self._draws = Draws()

    @property
    def epoch(self) -> int:
        """The epoch that was set last; 0 if none was."""
        return self._draws.epoch

    def set_epoch(self, epoch: int) -> None:
        """Choose the random crops of an epoch, also in workers that are already running.

        From then on sample n is a function of seed, epoch and n. Until it is called, every sample
        that is read gets another crop, whose place depends on how many were read before. Not
        needed with `BatchSampler`, which sends the epoch with every sample that it asks for.
        """
        self._draws.set_epoch(epoch)

    @property
    def seed(self) -> int:
        """The seed of the random crops and of the transforms."""
        return self.corpus.reading.seed

    @property
    def sizes(self) -> list[int]:
        """Samples of each store."""
        return self.corpus.sizes

    @property
    def records(self) -> list[int]:
        """Records of each store."""
        return self.corpus.records

    @property
    def digest(self) -> str:
        """A short hash of which samples there are."""
        return self.corpus.digest

    def __len__(self) -> int:
        return len(self.corpus)

    def shown(self) -> Mapping[str, object]:
        """What `repr` and a notebook show."""
        return {"samples": len(self), **self.corpus.shown(), "seed": self.seed}

    @property
    def lengths(self) -> Ints:
        """Frames of every sample that are an item's, `[len(dataset)]`; reads no latents."""
        return self.corpus.lengths

    def __getitem__(self, number: int | Request) -> Sample:
        return self.__getitems__([number])[0]

    def __getitems__(self, numbers: Sequence[int | Request]) -> list[Sample]:
        """Read samples, in one batch.

        Raises:
            IndexError: There is no such sample.
            StorageError: A shard cannot be read.
        """
        epochs, positions, found = self._draws.asked(numbers, len(self))
        sources = np.searchsorted(self.corpus.first, found, "right") - 1
        samples = found - self.corpus.first[sources]
        if len(set(epochs.tolist())) == 1:
            return list(self.corpus.read(sources, samples, int(epochs[0]), positions))
        read = zip(sources, samples, epochs, positions, strict=True)
        return [
            next(self.corpus.read(source[None], sample[None], int(epoch), position[None]))
            for source, sample, epoch, position in read
        ]
