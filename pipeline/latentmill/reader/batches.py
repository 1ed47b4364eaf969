"""`BatchSampler`: batches for the map-style datasets, shuffled, bucketed by length, resumable."""

from __future__ import annotations

import hashlib
import operator
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import torch
from torch.utils.data import DistributedSampler, Sampler

from latentmill.errors import ConfigError
from latentmill.reader.draws import Request, Requested
from latentmill.reader.order import EpochOrder, Ints, permutation
from latentmill.reader.sample import whole_number
from latentmill.reader.sharding import (
    BLOCK,
    STATE_VERSION,
    WINDOW,
    EpochProgress,
    Even,
    Rank,
    Resumable,
    accelerate_place,
    accelerate_processes,
    check_distributed_once,
    mixture,
)


class RequestDataset(Protocol):
    """A dataset that accepts requests of (epoch, position, number)."""

    def __len__(self) -> int:
        """Number of samples in all stores."""
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
    @property
    def digest_of_rows(self) -> str: ...


class BatchSampler(Resumable, Sampler[list[Request]]):
    """Batch sampler of a `LatentDataset` or `StemDataset`, for DataLoader's `batch_sampler`.

    The batches of an epoch are a pure function of dataset, seed and epoch. They are distributed
    round-robin to the ranks, so each sample is read exactly once for any number of ranks. Each
    iteration is the next epoch, unless `set_epoch` sets another one. The sampler sends epoch and
    position with each request: random crops are new in every epoch and for every draw of an item,
    in any kind of worker, and the same whenever training is repeated.

    Args:
        dataset: The dataset to sample from.
        batch_size: Samples per batch.
        sampler: A torch sampler that chooses the samples of an epoch and their order, such as
            `WeightedRandomSampler`. None yields every sample once, shuffled. Its random numbers
            become a function of `seed`, the epoch and the seed of its own generator. Its samples
            are distributed to the ranks, except those of a `DistributedSampler`, which does this
            itself.
        buckets: Number of groups of similar length. The samples of a batch come from one group;
            the last batches mix the leftovers of all groups. Useful for whole items
            (`crop=None`).
        drop_last: Whether to leave out batches that are not full.
        weights: As in `LatentStream`.
        shuffle: Whether to shuffle; with a `sampler`, only the order of batches from buckets.
        shuffle_block: As in `LatentStream`.
        shuffle_window: As in `LatentStream`.
        seed: Seed of the order. None uses the seed of the dataset.
        rank: Rank of this process. None uses `torch.distributed`.
        world_size: Number of processes that train together.
        even: What to do if batches cannot be shared evenly: `off`, `drop` or `pad`; see `Rank`.

    Raises:
        ConfigError: An option is invalid.
    """

    _kind = "batch sampler"

    def __init__(
        self,
        dataset: RequestDataset,
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
            raise ConfigError("give BatchSampler either a sampler or weights of stores, not both.")
        self.batch_size = whole_number("batch_size", batch_size, least=1)
        self.drop_last, self.dataset = drop_last, dataset
        self._sampler = sampler
        self._buckets = whole_number("buckets", buckets, least=1)
        self._mixture = mixture(
            dataset.sizes,
            weights,
            dataset.seed if seed is None else seed,
            shuffle=shuffle,
            block=shuffle_block,
            window=shuffle_window,
        )
        Resumable.__init__(self, rank, world_size, even)
        self._first = np.cumsum([0, *dataset.sizes])
        self._lengths = dataset.lengths if buckets > 1 else None
        self._epochs: dict[int, _Epoch] = {}

    @property
    def _rank(self) -> Rank:
        if isinstance(self._sampler, DistributedSampler):  # distributes by itself
            return Rank(0, 1, "off")
        return super()._rank

    @property
    def sampler(self) -> BatchSampler:
        """Returns itself, because Lightning calls `batch_sampler.sampler.set_epoch`."""
        return self

    def __len__(self) -> int:
        """Number of batches that this rank gets in a whole epoch, also after `load_state_dict`."""
        samples = self._mixture.total
        if self._sampler is not None:
            samples = len(self._epoch(self._upcoming().epoch).numbers)
        batches = samples // self.batch_size if self.drop_last else -(-samples // self.batch_size)
        return self._rank.share(batches)

    def __iter__(self) -> Iterator[list[Request]]:
        return _Batches(self)

    def requested(self) -> Iterator[Requested]:
        """The samples of the batches of the next iteration, as arrays for `Loader`."""
        self._now, self._next = self._upcoming(), None
        if self._sampler is not None and self._now.position == 0:
            self._epochs.pop(self._now.epoch, None)  # its weights may have changed since `len`
        epoch, start = self._epoch(self._now.epoch), self._now.position
        rank = self._rank
        check_distributed_once(self, rank, "BatchSampler")
        share = rank.share(len(epoch) - start)
        if not share:  # no batch left for this rank: go to the next epoch
            self._next = EpochProgress(self._now.epoch + 1)
        for turn in range(share):
            number = (start + rank.rank + turn * rank.world_size) % len(epoch)
            self._now = EpochProgress(self._now.epoch, start, turn + 1)
            yield epoch.batch(self._now.epoch, number)

    def state_after(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """The state after all ranks have trained on their batch of this step.

        Args:
            batch: This rank's last batch, from `collate`.
        """
        number = int(batch["epoch"][0])
        epoch = self._epoch(number)
        start = (self._next or self._now).on_epoch(number).position
        place, rank = epoch.batch_of(int(batch["position"][0])), self._rank
        together = max(rank.world_size, accelerate_processes(self))
        if accelerate_place(self) not in (None, (place - start) % together):
            # At the end of an epoch, accelerate gives some processes samples of its start.
            return self._state(EpochProgress(number, len(epoch)))
        turn = (place - start - rank.rank) % len(epoch) // together + 1
        return self._state_after(EpochProgress(number, start, turn), together)

    def _state_after(self, progress: EpochProgress, together: int) -> dict[str, Any]:
        """The state after each of `together` processes has read `progress.done` batches."""
        epoch, start, turns = progress.epoch, progress.position, progress.done
        batches, rank = len(self._epoch(epoch)), self._rank
        position = start + turns * together
        if rank.world_size == 1:
            position = min(position, batches)
        elif turns >= rank.largest_share(batches - start):
            position = batches
        return self._state(EpochProgress(epoch, position))

    def _records(self) -> list[int]:
        return self.dataset.records

    def _order(self, epoch: int, version: int = STATE_VERSION) -> str:
        digest = self.dataset.digest if version > 1 else self.dataset.digest_of_rows
        own = f"{digest}-{self.batch_size}-{self._buckets}-{self.drop_last}"
        sampler = self._sampler
        if sampler is None:
            return f"{self._mixture.digest}-{own}"
        if isinstance(sampler, DistributedSampler):
            replicas, total = sampler.num_replicas, sampler.total_size
            return f"{replicas}-{total}-{sampler.seed}-{sampler.shuffle}-{own}"
        return f"{self._epoch(epoch).digest}-{self._mixture.seed}-{own}"

    def _epoch(self, epoch: int) -> _Epoch:
        if epoch in self._epochs:
            return self._epochs[epoch]
        numbers = self._numbers(epoch)
        places = np.arange(len(numbers))
        order = np.arange(-(-len(numbers) // self.batch_size))
        if self._lengths is not None:
            places = self._bucketed(self._lengths[numbers])
            if self._mixture.shuffle:
                order = permutation(len(order), (self._mixture.seed, epoch, 4))
        if self.drop_last:
            order = order[order < len(numbers) // self.batch_size]
        first, step = 0, 1
        if isinstance(self._sampler, DistributedSampler):
            first, step = self._sampler.rank, self._sampler.num_replicas
        positions = range(first, first + len(numbers) * step, step)
        self._epochs[epoch] = _Epoch(numbers, positions, self.batch_size, places, order)
        # With a sampler, `len` needs the numbers of the next epoch, and a state those of this one.
        if len(self._epochs) > (1 if self._sampler is None else 2):
            del self._epochs[next(iter(self._epochs))]
        return self._epochs[epoch]

    def _numbers(self, epoch: int) -> Ints:
        """The sample numbers of an epoch, in order."""
        if self._sampler is not None:
            return sampled_numbers(self._sampler, len(self.dataset), self._mixture.seed, epoch)
        of_store, samples = EpochOrder(self._mixture, epoch).at(np.arange(self._mixture.total))
        numbers: Ints = self._first[of_store] + samples
        return numbers

    def _bucketed(self, lengths: Ints) -> Ints:
        """Places of an epoch in batches of similar length, followed by mixed leftovers."""
        edges = np.quantile(lengths, np.arange(1, self._buckets) / self._buckets)
        groups = np.searchsorted(edges, lengths, "left")
        full, rest = [], []
        for group in range(self._buckets):
            members = np.flatnonzero(groups == group)
            end = len(members) // self.batch_size * self.batch_size
            full.append(members[:end])
            rest.append(members[end:])
        return np.concatenate([*full, *rest])


class _Batches(Iterator[list[Request]]):
    """An iteration over a `BatchSampler`, with the state that torchdata's loader saves.

    `StatefulDataLoader` asks for the state after each batch that it takes, and returns it when
    training has this batch, so batches that workers read ahead do not count.
    """

    def __init__(self, sampler: BatchSampler) -> None:
        self._sampler, self._requested = sampler, sampler.requested()
        self._within = False  # whether the last call of `next` gave a batch

    def __next__(self) -> list[Request]:
        self._within = False
        epoch, positions, numbers = next(self._requested)
        self._within = True
        pairs = zip(positions.tolist(), numbers.tolist(), strict=True)
        return [(epoch, *pair) for pair in pairs]

    def state_dict(self) -> dict[str, Any]:
        """The state after the batches of this iteration so far, or before the next one."""
        sampler = self._sampler
        if not self._within:
            return sampler.upcoming_state()
        return sampler._state_after(sampler._now, sampler._rank.world_size)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume the sampler from a state, before the first batch of this iteration."""
        self._sampler.load_state_dict(state)


@dataclass(frozen=True)
class _Epoch:
    """The batches of one epoch.

    Attributes:
        numbers: Number in the dataset of the sample at each place of this process's epoch.
        positions: Position of each place in the epoch of all processes.
        size: Samples per batch.
        places: All places; every `size` of them are a batch, and so are those left at the end.
        order: The order in which these batches are read.
    """

    numbers: Ints
    positions: range
    size: int
    places: Ints
    order: Ints

    def __len__(self) -> int:
        return len(self.order)

    def batch(self, epoch: int, number: int) -> Requested:
        """The samples of a batch."""
        first = int(self.order[number]) * self.size
        places = self.places[first : first + self.size]
        positions = self.positions.start + places * self.positions.step
        return Requested(epoch, positions, self.numbers[places])

    def batch_of(self, position: int) -> int:
        """The batch that contains a position."""
        places, order = self._inverse
        return int(order[places[self.positions.index(position)] // self.size])

    @cached_property
    def _inverse(self) -> tuple[Ints, Ints]:
        """Inverse permutations of `places` and `order`."""
        return _inverted(self.places), _inverted(self.order)

    @cached_property
    def digest(self) -> str:
        """A short hash of the numbers."""
        return hashlib.sha256(self.numbers.tobytes()).hexdigest()[:16]


def sampled_numbers(sampler: Any, size: int, seed: int, epoch: int) -> Ints:
    """The numbers that a torch sampler yields in an epoch, a function of seed and epoch.

    While the sampler draws, its generator (or torch's, if it has none) is replaced.
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
    try:
        found = np.array([operator.index(number) for number in numbers], np.int64)
    except TypeError as error:
        raise ConfigError(
            f"{type(sampler).__name__} does not yield sample numbers: give BatchSampler a sampler "
            "of single samples, not one of batches."
        ) from error
    if len(found) and not (found.min() >= 0 and found.max() < size):
        raise ConfigError(
            f"{type(sampler).__name__} yields numbers up to {found.max()}, but the dataset has "
            f"samples 0 to {size - 1}: create the sampler for this dataset."
        )
    return found


def _inverted(order: Ints) -> Ints:
    inverse = np.empty_like(order)
    inverse[order] = np.arange(len(order))
    return inverse
