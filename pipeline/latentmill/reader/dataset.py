"""`LatentDataset`: the map-style dataset over one or several stores."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

from torch.utils.data import Dataset

import latentmill.reader.collate  # noqa: F401  registers our samples with torch's default collate
from latentmill.reader.corpus import Corpus, Mode, Reading, Stores
from latentmill.reader.draws import Draws, Request
from latentmill.reader.field_crops import Missing, checked_names
from latentmill.reader.fields import Where
from latentmill.reader.order import Ints
from latentmill.reader.sample import Sample, Transform, checked_transforms
from latentmill.text.shown import Shown


class LatentDataset(Shown, Dataset[Sample]):
    """Map-style dataset: samples of one or several stores, numbered in the order of the shards.

    Use it with `torch.utils.data.DataLoader` and `collate_fn=latentmill.collate`. `__getitems__`
    reads a whole batch: one positioned read per local crop, or one round of requests to a remote
    store. The dataset is small when pickled and can be forked.

    Args:
        stores: One store or several of the same model: paths, URLs or open stores.
        crop: Frames per sample. None reads whole items.
        mode: Where crops start: `random` (a function of seed, epoch and number), `start`, or
            `windows`, which makes each consecutive window of an item a sample. A crop that is
            longer than its item is padded with silence, where the mask is False.
        seed: Seed of the random crops and of the transforms.
        where: Which records to read: a condition such as `"role == 'drums'"`, a function or a
            pyarrow expression; see `select` in `reader/fields.py`.
        metadata: Whether to read the items' own metadata.
        transforms: Transforms for every sample, applied in this order.
        fields: Names of the stores' fields to read. Those with a rate are cut to the seconds of the
            crop, the others come whole; see `Sample.fields`.
        missing_fields: What to do with records that have no value of one of the fields: `error`,
            or `leave_out`.
        cache: Local folder that caches shards of remote stores.
        cache_gib: Maximum size of the cache, in GiB.

    Raises:
        ConfigError: The stores cannot be mixed or cropped, or an option is invalid.
        StoreError: A store or a field does not exist or is empty.
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
        fields: Sequence[str] = (),
        missing_fields: Missing = "error",
        cache: str | os.PathLike[str] | None = None,
        cache_gib: float = 50.0,
    ) -> None:
        own, names = checked_transforms(transforms), checked_names(fields)
        reading = Reading(crop, mode, seed, metadata, own, names, missing_fields)
        self.corpus = Corpus(stores, reading, where=where, cache=cache, cache_gib=cache_gib)
        self._draws = Draws()

    @property
    def epoch(self) -> int:
        """The epoch of the last `set_epoch`; 0 before it."""
        return self._draws.epoch

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch that random crops depend on, also in workers that are already running.

        From then on, sample n is a function of seed, epoch and n. Before the first call, each read
        gets a new crop that depends on how many samples were read before. `BatchSampler` does not
        need this call, because it sends the epoch with every request.
        """
        self._draws.set_epoch(epoch)

    @property
    def seed(self) -> int:
        """Seed of the random crops and of the transforms."""
        return self.corpus.reading.seed

    @property
    def sizes(self) -> list[int]:
        """Number of samples of each store."""
        return self.corpus.sizes

    @property
    def records(self) -> list[int]:
        """Number of records of each store."""
        return self.corpus.records

    @property
    def digest(self) -> str:
        """A short hash of the stores and of the samples chosen from them."""
        return self.corpus.digest

    @property
    def digest_of_rows(self) -> str:
        """The same without the items, as in states of earlier versions."""
        return self.corpus.digest_of_rows

    def __len__(self) -> int:
        return len(self.corpus)

    def shown(self) -> Mapping[str, object]:
        """The values that `repr` and a notebook show."""
        return {"samples": len(self), **self.corpus.shown(), "seed": self.seed}

    @property
    def lengths(self) -> Ints:
        """Frames of each sample before padding, `[len(dataset)]`; reads no latents."""
        return self.corpus.lengths

    def __getitem__(self, number: int | Request) -> Sample:
        return self.__getitems__([number])[0]

    def __getitems__(self, numbers: Sequence[int | Request]) -> list[Sample]:
        """Read samples in one batch.

        Raises:
            IndexError: A number is out of range.
            StorageError: A shard cannot be read.
        """
        epochs, positions, found = self._draws.resolve(numbers, len(self))
        of_store, samples = self.corpus.stores_of(found)
        if len(set(epochs.tolist())) == 1:
            return list(self.corpus.read(of_store, samples, int(epochs[0]), positions))
        read = zip(of_store, samples, epochs, positions, strict=True)
        return [
            next(self.corpus.read(store[None], sample[None], int(epoch), position[None]))
            for store, sample, epoch, position in read
        ]
