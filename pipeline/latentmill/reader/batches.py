"""Batches for the map-style datasets: shuffled, bucketed by length, sharded, resumable."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch.utils.data import DistributedSampler, Sampler

from latentmill.errors import ConfigError
from latentmill.reader.draws import Request
from latentmill.reader.order import EpochOrder, Ints, permutation
from latentmill.reader.sample import whole_number
from latentmill.reader.sharding import (
    BLOCK,
    STATE_VERSION,
    WINDOW,
    EpochProgress,
    Even,
    Rank,
    check_dealt_once,
    check_state,
    dealt_by_accelerate,
    mixture,
)


class Numbered(Protocol):
    """A dataset that can be asked for (epoch, position, number): ours."""

    def __len__(self) -> int:
        """Samples of all stores."""
        ...

    @property
    def seed(self) -> int: ...
    @property
    def sizes(self) -> list[int]: ...
    @property
    def records(self) -> list[int]: ...
    @property
    def lengths(self) -> Ints: ...
    @property
    def digest(self) -> str: ...


class BatchSampler(Sampler[list[Request]]):
    """Which samples of a `LatentDataset` or `StemDataset` make which batch.

    For DataLoader's `batch_sampler`. An epoch's batches are a pure function of dataset, seed and
    epoch, and are dealt to the ranks in turn: every sample exactly once, whatever the number of
    ranks. Every iteration is the next epoch, unless `set_epoch` says which. Each sample is asked
    for with its epoch and its place in it, so that random crops are new in every epoch and for
    every draw of an item, in workers of any kind, and the same in every run.

    Args:
        dataset: What is sampled from.
        batch_size: Samples of a batch.
        sampler: A torch sampler that chooses the samples of an epoch and their order, such as
            `WeightedRandomSampler`; None: every sample once, shuffled. Its random numbers are made
            a function of `seed`, the epoch and the seed of its own generator. What it gives is
            dealt to the ranks, except by `DistributedSampler`, which does so itself.
        buckets: How many groups of like lengths the samples are divided into: a batch is of one
            group, but for what remains of all groups. For whole items (`crop=None`).
        drop_last: Leave out an epoch's batch that is not full.
        weights: As of `LatentStream`.
        shuffle: Whether to shuffle; with a `sampler`, only the order of batches from buckets.
        shuffle_block: As of `LatentStream`.
        shuffle_window: As of `LatentStream`.
        seed: Of the order; None: the dataset's.
        rank: This process among those that train together; None: as `torch.distributed` says.
        world_size: How many they are.
        even: What happens to batches that cannot be dealt evenly: see `Rank`.

    Raises:
        ConfigError: An option does not fit.
    """

    def __init__(
        self,
        dataset: Numbered,
        batch_size: int,
        *,
        sampler: Iterable[int] | None = None,
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
        if not hasattr(dataset, "digest"):
            raise ConfigError(
                f"BatchSampler needs a LatentDataset or StemDataset, not {type(dataset).__name__}."
            )
        if sampler is not None and weights is not None:
            raise ConfigError("Give BatchSampler either a sampler or weights of stores, not both.")
        self.batch_size = whole_number("batch_size", batch_size, least=1)
        self.drop_last = drop_last
        self._dataset, self._drawn_by = dataset, sampler
        self._buckets = whole_number("buckets", buckets, least=1)
        self._mixture = mixture(
            dataset.sizes,
            weights,
            dataset.seed if seed is None else seed,
            shuffle=shuffle,
            block=shuffle_block,
            window=shuffle_window,
        )
        self._asked = (rank, world_size, even)
        Rank.of(*self._asked)  # refuses what cannot be
        self._first = np.cumsum([0, *dataset.sizes])
        self._lengths = dataset.lengths if buckets > 1 else None
        self._epochs: dict[int, _Epoch] = {}
        self._next: EpochProgress | None = EpochProgress()
        self._now = EpochProgress()

    @property
    def _rank(self) -> Rank:
        if isinstance(self._drawn_by, DistributedSampler):  # has dealt already
            return Rank(0, 1, "off")
        return Rank.of(*self._asked)

    @property
    def sampler(self) -> BatchSampler:
        """Itself: where Lightning looks for `set_epoch`."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of the next iteration. After `load_state_dict`, the same one goes on."""
        whole_number("epoch", epoch, least=0)
        self._next = (self._next or EpochProgress(self._now.epoch)).on_epoch(epoch)

    def __len__(self) -> int:
        """Batches that the next iteration gives to this rank."""
        progress = self._upcoming()
        return self._rank.share(len(self._epoch(progress.epoch)) - progress.position)

    def __iter__(self) -> Iterator[list[Request]]:
        self._now, self._next = self._upcoming(), None
        epoch, start = self._epoch(self._now.epoch), self._now.position
        rank = self._rank
        check_dealt_once(self, rank, "BatchSampler")
        share = rank.share(len(epoch) - start)
        if not share:  # none of the rest is for this rank: it goes on with the others
            self._next = EpochProgress(self._now.epoch + 1)
        for turn in range(share):
            number = (start + rank.rank + turn * rank.world_size) % len(epoch)
            self._now = EpochProgress(self._now.epoch, start, turn + 1)
            places = epoch.batch(number)
            positions, numbers = epoch.positions[places].tolist(), epoch.numbers[places].tolist()
            yield [
                (self._now.epoch, position, sample)
                for position, sample in zip(positions, numbers, strict=True)
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
        together = max(rank.world_size, dealt_by_accelerate(self))
        turn = (place - start - rank.rank) % len(epoch) // together + 1
        position = start + turn * together
        if rank.world_size == 1:
            position = min(position, len(epoch))
        elif turn >= rank.largest_share(len(epoch) - start):
            position = len(epoch)
        return {
            "kind": "batch sampler",
            "version": STATE_VERSION,
            "order": self._digest(number),
            "records": self._dataset.records,
            "epoch": number,
            "position": position,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where a state was saved, with any number of ranks.

        Raises:
            ConfigError: The state is of another order: other stores, seed, batch size, buckets or
                sampler.
        """
        digest = self._digest(int(state.get("epoch", 0)))
        self._next = check_state(state, "batch sampler", digest, self._dataset.records)

    def _digest(self, epoch: int) -> str:
        """A short hash of an epoch's order, the same on all ranks."""
        own = f"{self._dataset.digest}-{self.batch_size}-{self._buckets}-{self.drop_last}"
        drawn = self._drawn_by
        if drawn is None:
            return f"{self._mixture.digest}-{own}"
        if isinstance(drawn, DistributedSampler):
            return f"{drawn.num_replicas}-{drawn.total_size}-{drawn.seed}-{drawn.shuffle}-{own}"
        numbers = hashlib.sha256(self._epoch(epoch).numbers.tobytes()).hexdigest()[:16]
        return f"{numbers}-{self._mixture.seed}-{own}"

    def _upcoming(self) -> EpochProgress:
        if self._next is not None:
            return self._next
        return EpochProgress(self._now.epoch + 1) if self._now.done else self._now

    def _epoch(self, epoch: int) -> _Epoch:
        if epoch not in self._epochs:
            self._epochs = {epoch: self._arrange(epoch)}
        return self._epochs[epoch]

    def _arrange(self, epoch: int) -> _Epoch:
        numbers = self._numbers(epoch)
        places = np.arange(len(numbers))
        batches = _cut(places, self.batch_size)
        if self._lengths is not None:
            batches = self._bucketed(self._lengths[numbers])
            if self._mixture.shuffle:
                order = permutation(len(batches), (self._mixture.seed, epoch, 4))
                batches = [batches[number] for number in order.tolist()]
        if self.drop_last:
            batches = [batch for batch in batches if len(batch) == self.batch_size]
        ends = np.cumsum([0, *(len(batch) for batch in batches)])
        positions = places
        if isinstance(self._drawn_by, DistributedSampler):
            positions = places * self._drawn_by.num_replicas + self._drawn_by.rank
        return _Epoch(numbers, positions, np.concatenate([places[:0], *batches]), ends)

    def _numbers(self, epoch: int) -> Ints:
        """The numbers of an epoch's samples, in their order."""
        if self._drawn_by is not None:
            return drawn_numbers(self._drawn_by, len(self._dataset), self._mixture.seed, epoch)
        sources, samples = EpochOrder(self._mixture, epoch).at(np.arange(self._mixture.total))
        numbers: Ints = self._first[sources] + samples
        return numbers

    def _bucketed(self, lengths: Ints) -> list[Ints]:
        """The places of an epoch in batches of like lengths; what is left over comes last."""
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
    """The batches of one epoch: `places[ends[b]:ends[b + 1]]` is batch b.

    Attributes:
        numbers: The dataset's number of the sample at each place of this process's epoch.
        positions: Its position in the epoch of all processes.
        places: Places in the order of the batches.
        ends: Where batches begin and end in `places`.
    """

    numbers: Ints
    positions: Ints
    places: Ints
    ends: Ints

    def __len__(self) -> int:
        return len(self.ends) - 1

    def batch(self, number: int) -> Ints:
        return self.places[self.ends[number] : self.ends[number + 1]]

    def batch_of(self, position: int) -> int:
        """The batch that a position is in."""
        place = np.flatnonzero(self.positions[self.places] == position)[0]
        return int(np.searchsorted(self.ends, place, "right")) - 1


def drawn_numbers(sampler: Any, size: int, seed: int, epoch: int) -> Ints:
    """What a torch sampler gives in an epoch: a function of seed and epoch, on every rank.

    Its generator, or torch's where it has none, is replaced while it draws.

    Raises:
        ConfigError: It does not give numbers of samples.
    """
    if hasattr(sampler, "set_epoch"):
        sampler.set_epoch(epoch)
    generator = getattr(sampler, "generator", None)
    own = generator.initial_seed() if isinstance(generator, torch.Generator) else 0
    words = np.random.SeedSequence((seed, epoch, own, 5)).generate_state(1, np.uint64)
    key = int(words[0] >> np.uint64(1))
    try:
        if isinstance(generator, torch.Generator):
            sampler.generator = torch.Generator(generator.device).manual_seed(key)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(key)
            numbers = list(sampler)
    finally:
        if isinstance(generator, torch.Generator):
            sampler.generator = generator
    if not all(isinstance(number, int | np.integer) for number in numbers):
        raise ConfigError(
            f"{type(sampler).__name__} does not give numbers of samples: give BatchSampler the "
            "sampler of single samples, not one of batches."
        )
    found = np.array(numbers, np.int64)
    if len(found) and not (found.min() >= 0 and found.max() < size):
        raise ConfigError(
            f"{type(sampler).__name__} gives numbers up to {found.max()}, but the dataset has "
            f"samples 0 to {size - 1}: make the sampler for this dataset."
        )
    return found


def _cut(positions: Ints, size: int) -> list[Ints]:
    return [positions[at : at + size] for at in range(0, len(positions), size)]
