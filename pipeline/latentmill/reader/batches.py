"""Batches for the map-style dataset: shuffled, bucketed by length, sharded, resumable."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch.utils.data import Sampler

from latentmill.errors import ConfigError
from latentmill.reader.dataset import Ask, LatentDataset
from latentmill.reader.order import EpochOrder, Ints, permutation
from latentmill.reader.sharding import (
    BLOCK,
    STATE_VERSION,
    WINDOW,
    Even,
    Progress,
    Rank,
    check_state,
    mixture,
)


class BatchSampler(Sampler[list[Ask]]):
    """Which samples of a `LatentDataset` make which batch: for DataLoader's `batch_sampler`.

    An epoch's batches are a pure function of data set, seed and epoch, and are dealt to the ranks
    in turn: every sample exactly once, whatever the number of ranks. Every iteration is the next
    epoch, unless `set_epoch` says which; with each sample goes its epoch, so that the crops of an
    epoch are its own, in workers of any kind.

    Args:
        dataset: What is sampled from.
        batch_size: Samples of a batch.
        buckets: How many groups of like lengths the samples are divided into: a batch is of one
            group, but for what remains of all groups. For whole items (`crop=None`).
        drop_last: Leave out an epoch's batch that is not full.
        weights: As of `LatentStream`.
        shuffle: Whether to shuffle.
        shuffle_block: As of `LatentStream`.
        shuffle_window: As of `LatentStream`.
        seed: Of the order; None: the data set's.
        rank: This process among those that train together; None: as `torch.distributed` says.
        world_size: How many they are.
        even: What happens to batches that cannot be dealt evenly: see `Rank`.

    Raises:
        ConfigError: An option does not fit.
    """

    def __init__(
        self,
        dataset: LatentDataset,
        batch_size: int,
        *,
        buckets: int = 1,
        drop_last: bool = False,
        weights: Sequence[float] | None = None,
        shuffle: bool = True,
        shuffle_block: int = BLOCK,
        shuffle_window: int = WINDOW,
        seed: int | None = None,
        rank: int | None = None,
        world_size: int | None = None,
        even: Even = "off",
    ) -> None:
        if batch_size < 1 or buckets < 1:
            raise ConfigError("batch_size and buckets need at least 1.")
        corpus = dataset.corpus
        self._mixture = mixture(
            [len(source) for source in corpus.sources],
            weights,
            corpus.reading.seed if seed is None else seed,
            shuffle=shuffle,
            block=shuffle_block,
            window=shuffle_window,
        )
        self._asked = (rank, world_size, even)
        Rank.of(*self._asked)  # refuses what cannot be
        self.batch_size, self._buckets, self._drop_last = batch_size, buckets, drop_last
        self._first = corpus.first
        self._lengths = dataset.lengths if buckets > 1 else None
        self._digest = f"{self._mixture.digest}-{corpus.digest}-{batch_size}-{buckets}-{drop_last}"
        self._epochs: dict[int, _Epoch] = {}
        self._next: Progress | None = Progress()
        self._now = Progress()

    @property
    def _rank(self) -> Rank:
        return Rank.of(*self._asked)

    @property
    def sampler(self) -> BatchSampler:
        """Itself: where Lightning looks for `set_epoch`."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Say which epoch the next iteration is. After `load_state_dict`, the same one goes on."""
        self._next = (self._next or Progress(self._now.epoch)).on_epoch(epoch)

    def __len__(self) -> int:
        """Batches that the next iteration gives to this rank."""
        progress = self._upcoming()
        return self._rank.share(len(self._epoch(progress.epoch)) - progress.position)

    def __iter__(self) -> Iterator[list[Ask]]:
        self._now, self._next = self._upcoming(), None
        epoch, start = self._epoch(self._now.epoch), self._now.position
        rank = self._rank
        share = rank.share(len(epoch) - start)
        if not share:  # none of the rest is for this rank: it goes on with the others
            self._next = Progress(self._now.epoch + 1)
        for turn in range(share):
            number = (start + rank.rank + turn * rank.world_size) % len(epoch)
            self._now = Progress(self._now.epoch, start, turn + 1)
            positions = epoch.batch(number)
            numbers = epoch.numbers[positions]
            yield [
                (self._now.epoch, position, sample)
                for position, sample in zip(positions.tolist(), numbers.tolist(), strict=True)
            ]

    def state_after(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Where training is when all ranks have trained on their batch of this step.

        Args:
            batch: This rank's last batch, from `collate`.
        """
        number = int(batch["epoch"][0])
        epoch = self._epoch(number)
        start = (self._next or self._now).on_epoch(number).position
        place, rank = epoch.batch_of(int(batch["position"][0])), self._rank
        turn = (place - start - rank.rank) % len(epoch) // rank.world_size + 1
        position = start + turn * rank.world_size
        if turn >= rank.largest_share(len(epoch) - start):
            position = len(epoch)
        return {
            "kind": "batch sampler",
            "version": STATE_VERSION,
            "order": self._digest,
            "epoch": number,
            "position": position,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where a state was saved, with any number of ranks.

        Raises:
            ConfigError: The state is of another order: other stores, seed, batch size or buckets.
        """
        self._next = check_state(state, "batch sampler", self._digest)

    def _upcoming(self) -> Progress:
        if self._next is not None:
            return self._next
        return Progress(self._now.epoch + 1) if self._now.done else self._now

    def _epoch(self, epoch: int) -> _Epoch:
        if epoch not in self._epochs:
            self._epochs = {epoch: self._arrange(epoch)}
        return self._epochs[epoch]

    def _arrange(self, epoch: int) -> _Epoch:
        positions = np.arange(self._mixture.total)
        sources, samples = EpochOrder(self._mixture, epoch).at(positions)
        numbers = self._first[sources] + samples
        batches = _cut(positions, self.batch_size)
        if self._lengths is not None:
            batches = self._bucketed(self._lengths[numbers])
            if self._mixture.shuffle:
                order = permutation(len(batches), (self._mixture.seed, epoch, 4))
                batches = [batches[number] for number in order.tolist()]
        if self._drop_last:
            batches = [batch for batch in batches if len(batch) == self.batch_size]
        ends = np.cumsum([0, *(len(batch) for batch in batches)])
        return _Epoch(numbers, np.concatenate([positions[:0], *batches]), ends)

    def _bucketed(self, lengths: Ints) -> list[Ints]:
        """The positions of an epoch in batches of like lengths; what is left over comes last."""
        edges = np.quantile(lengths, np.arange(1, self._buckets) / self._buckets)
        groups = np.searchsorted(edges, lengths, "left")
        batches, rest = [], []
        for group in range(self._buckets):
            members = np.flatnonzero(groups == group)
            full = len(members) // self.batch_size * self.batch_size
            batches += _cut(members[:full], self.batch_size)
            rest.append(members[full:])
        return batches + _cut(np.concatenate(rest), self.batch_size)


@dataclass(frozen=True)
class _Epoch:
    """The batches of one epoch: `places[ends[b]:ends[b + 1]]` are the positions of batch b.

    Attributes:
        numbers: The data set's number of the sample at each position of the epoch.
        places: Positions in the order of the batches.
        ends: Where batches begin and end in `places`.
    """

    numbers: Ints
    places: Ints
    ends: Ints

    def __len__(self) -> int:
        return len(self.ends) - 1

    def batch(self, number: int) -> Ints:
        return self.places[self.ends[number] : self.ends[number + 1]]

    def batch_of(self, position: int) -> int:
        """The batch that a position is in."""
        place = np.flatnonzero(self.places == position)[0]
        return int(np.searchsorted(self.ends, place, "right")) - 1


def _cut(positions: Ints, size: int) -> list[Ints]:
    return [positions[at : at + size] for at in range(0, len(positions), size)]
