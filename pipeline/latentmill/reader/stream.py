"""`LatentStream`: the iterable dataset, shuffled, mixed, distributed and resumable."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from torch.utils.data import IterableDataset, get_worker_info

import latentmill.reader.collate  # noqa: F401  registers our samples with torch's default collate
from latentmill.errors import ConfigError
from latentmill.reader.corpus import Corpus, Mode, Reading, Stores
from latentmill.reader.draws import Requested, Starts
from latentmill.reader.field_crops import Missing, checked_names
from latentmill.reader.fields import Where
from latentmill.reader.order import EpochOrder, Ints
from latentmill.reader.sample import Sample, Transform, checked_transforms, whole_number
from latentmill.reader.sharding import (
    BLOCK,
    STATE_VERSION,
    WINDOW,
    EpochProgress,
    Even,
    Resumable,
    accelerate_place,
    accelerate_processes,
    accelerate_shards,
    check_distributed_once,
    mixture,
)
from latentmill.record import as_array
from latentmill.text.shown import Shown

READ_TOGETHER = 32  # minimum number of samples per batch of requests
ORDERED_TOGETHER = 16  # batches of a Loader whose order is computed at once


class LatentStream(Shown, Resumable, IterableDataset[Sample]):
    """Iterable dataset: epochs of samples of one or several stores.

    Samples are read as in `LatentDataset`. The order of an epoch is a pure function of stores, seed
    and epoch. Its samples are distributed round-robin to the ranks, and those of a rank to its
    DataLoader workers, so each is read exactly once for any number of ranks and workers. With
    `batch_size`, workers take turns by whole batches: the loader then yields the same batches as a
    single process, and `state_after` can tell how much was trained on.

    Each iteration is the next epoch. Without `persistent_workers=True`, a DataLoader starts new
    workers for each epoch as copies of this object: call `set_epoch` before each epoch then. A
    loader that would repeat an epoch because this call is missing warns.

    Args:
        stores: One store or several of the same model: paths, URLs or open stores.
        weights: Relative sampling weight of each store. An epoch then has as many samples as all
            stores together, and continues in each store where the last epoch stopped, so each pass
            through a store yields every sample once. None: an epoch has every sample once.
        crop: As in `LatentDataset`; so is `mode`.
        shuffle: Whether to shuffle; otherwise samples come in the order of stores and shards.
        shuffle_block: Number of neighbours that are shuffled as one block; 1 shuffles single
            samples over the whole epoch.
        shuffle_window: Number of samples in a window, in which single samples are shuffled.
        seed: Seed of the order, the random crops and the transforms.
        rank: Rank of this process. None uses `torch.distributed`.
        world_size: Number of processes that train together.
        even: What to do if samples cannot be shared evenly: `off`, `drop` or `pad`; see `Rank`.
        batch_size: The `batch_size` of the DataLoader.
        where: As in `LatentDataset`; so are `metadata`, `transforms`, `fields`, `missing_fields`,
            `cache` and `cache_gib`.

    Raises:
        ConfigError, StoreError: As for `LatentDataset`.
    """

    _kind = "stream"

    def __init__(
        self,
        stores: Stores,
        weights: Sequence[float] | None = None,
        *,
        crop: int | None = None,
        mode: Mode = "random",
        shuffle: bool = True,
        shuffle_block: int = BLOCK,
        shuffle_window: int = WINDOW,
        seed: int = 0,
        rank: int | None = None,
        world_size: int | None = None,
        even: Even = "off",
        batch_size: int | None = None,
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
        Resumable.__init__(self, rank, world_size, even)
        if batch_size is not None:
            whole_number("batch_size", batch_size, least=1)
        self.batch_size = batch_size
        self.corpus = Corpus(stores, reading, where=where, cache=cache, cache_gib=cache_gib)
        sizes = self.corpus.sizes
        self._mixture = mixture(
            sizes, weights, seed, shuffle=shuffle, block=shuffle_block, window=shuffle_window
        )
        self._starts, self._version = Starts(), 0
        self._share: tuple[int, ...] | None = None  # rank and worker that `_now` belongs to
        self._loaded_share: tuple[int, ...] | None = None
        self._accelerate_shards = 1
        self._iteration = 0  # number of the last iteration

    def __getstate__(self) -> dict[str, Any]:
        # A spawned worker has no process group and no accelerate state, so pass both on.
        state, rank = self.__dict__ | {"_accelerate_shards": accelerate_shards(self)}, self._rank
        if rank.world_size > 1:
            state["_rank_options"] = (rank.rank, rank.world_size, rank.even)
        return state

    def shown(self) -> Mapping[str, object]:
        """The values that `repr` and a notebook show."""
        return {
            "samples": self._mixture.total,
            **self.corpus.shown(),
            "shuffle": self._mixture.shuffle,
            "seed": self._mixture.seed,
        }

    def __len__(self) -> int:
        """Number of samples that this rank gets in a whole epoch, also after `load_state_dict`."""
        return self._rank.share(self._mixture.total)

    def __iter__(self) -> Iterator[Sample]:
        worker = get_worker_info()
        id_, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        # From each worker's samples, accelerate takes one batch for each process.
        turn = (self.batch_size or 1) * max(self._accelerate_shards, accelerate_shards(self))
        self._begin((self._rank.rank, self._rank.world_size, id_, workers, turn))
        reading = self.corpus.reading
        crops = reading.crop is not None and reading.mode == "random"
        epochs_differ = self._mixture.shuffle or crops or reading.transforms
        if worker and id_ == 0 and epochs_differ:
            self._starts.check_repeated(self._now)
        share = id_, workers, turn
        return self._samples(self._iteration, self._now.epoch, self._now.position, *share)

    def _begin(self, share: tuple[int, ...]) -> None:
        """Begin the next iteration, as one worker of a rank."""
        check_distributed_once(self, self._rank, "LatentStream")
        self._iteration += 1
        self._now, self._next = self._upcoming(), None
        if self._now.done and self._loaded_share != share:
            raise ConfigError(
                "the state belongs to one of several DataLoader workers: resume with the numbers "
                "of ranks and workers and the batch size that it was saved with, or save "
                "state_after(batch) instead."
            )
        self._share = share

    def requested(self, batch_size: int, *, drop_last: bool) -> Iterator[Requested]:
        """The samples of the batches of the next iteration, for `Loader`."""
        rank, total = self._rank, self._mixture.total
        self._begin((rank.rank, rank.world_size, 0, 1, batch_size))
        self._share = None  # `Loader` reads ahead, so only its own state is exact
        epoch, start, done = self._now.epoch, self._now.position, self._now.done
        order, count = EpochOrder(self._mixture, epoch), rank.share(total - start)
        if drop_last:
            count -= (count - done) % batch_size
        if done == count:  # no batch left for this rank: go to the next epoch
            self._next = EpochProgress(epoch + 1)
        for first in range(done, count, ORDERED_TOGETHER * batch_size):
            local = np.arange(first, min(first + ORDERED_TOGETHER * batch_size, count))
            positions: Ints = start + rank.rank + local * rank.world_size
            of_store, samples = order.at(positions % total)
            numbers = self.corpus.first[of_store] + samples
            for at in range(0, len(local), batch_size):
                batch = slice(at, at + batch_size)
                self._now = EpochProgress(epoch, start, int(local[batch][-1]) + 1)
                yield Requested(epoch, positions[batch], numbers[batch])

    def _start_at(self, progress: EpochProgress) -> None:
        super()._start_at(progress)
        if get_worker_info() is None:  # torchdata loads a worker's state in the worker
            self._starts.set(progress)
            self._version = self._starts.version

    def _upcoming(self) -> EpochProgress:
        if self._version != self._starts.version:  # set since this worker was started
            self._version, self._next = self._starts.version, self._starts.progress
        return super()._upcoming()

    def _samples(
        self, iteration: int, epoch: int, start: int, worker: int, workers: int, turn: int
    ) -> Iterator[Sample]:
        self._refuse_unless_last(iteration)
        order, total = EpochOrder(self._mixture, epoch), self._mixture.total
        rank = self._rank
        count = worker_share(rank.share(total - start), worker, workers, turn)
        together = max(READ_TOGETHER, turn)
        while self._now.done < count:
            last = min(self._now.done + together, count)
            steps = np.arange(self._now.done, last)
            local = (steps // turn * workers + worker) * turn + steps % turn
            positions: Ints = start + rank.rank + local * rank.world_size
            of_store, samples = order.at(positions % total)
            for sample in self.corpus.read(of_store, samples, epoch, positions):
                self._now = EpochProgress(epoch, start, self._now.done + 1)
                yield sample
                self._refuse_unless_last(iteration)
        if not count:  # no sample left for this worker: go to the next epoch
            self._next = EpochProgress(epoch + 1)

    def _refuse_unless_last(self, iteration: int) -> None:
        if iteration != self._iteration:
            raise ConfigError(
                "this iterator cannot continue, because its LatentStream was iterated over again: "
                "use one iterator of a LatentStream at a time."
            )

    def state_dict(self) -> dict[str, Any]:
        """The exact state of this process's own iteration.

        Use it if you iterate over the stream itself or with a DataLoader without workers;
        torchdata's StatefulDataLoader calls it in its workers. If a plain DataLoader has workers,
        save `state_after(batch)`, because workers read ahead of training.

        Raises:
            ConfigError: The stream was not iterated over in this process.
        """
        if self._share is None:
            raise ConfigError(
                "this stream was not iterated over in this process, but in copies in DataLoader "
                "workers: save state_after(batch) with the last batch that was trained on."
            )
        if self._share[3] > 1:
            return self._state(self._now) | {"done": self._now.done, "share": list(self._share)}
        return self._state(self._after(self._now, self._now.done))

    def state_after(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """The state after all ranks have trained on their batch of this step.

        Args:
            batch: This rank's last batch, from `collate`.

        Raises:
            ConfigError: The batch is not one that a single process would read: `batch_size` is not
                the DataLoader's.
        """
        epoch, positions = int(batch["epoch"][0]), np.asarray(as_array(batch["position"]))
        start = (self._next or self._now).on_epoch(epoch).position
        rank, size = self._rank, self.batch_size or 1
        local, wrong = np.divmod(positions - start - rank.rank, rank.world_size)
        count = rank.share(self._mixture.total - start)
        first, last = int(local[0]), int(local[-1]) + 1
        if self._is_last_of_accelerate(first, count):
            return self._state(EpochProgress(epoch, self._mixture.total))
        whole = self.batch_size is None or (
            first % self.batch_size == 0 and (len(local) == self.batch_size or last == count)
        )
        if wrong.any() or (np.diff(local) != 1).any() or not whole or last > count:
            raise ConfigError(
                "cannot tell from this batch which samples were read: give LatentStream the "
                "DataLoader's batch_size, and do not reorder batches."
            )
        # If this batch is not full, it is the last one on all ranks; one may have one more sample.
        step = size * accelerate_processes(self)
        return self._state(self._after(EpochProgress(epoch, start), -(-last // step) * step))

    def _is_last_of_accelerate(self, first: int, count: int) -> bool:
        """Whether a batch of accelerate that begins with sample `first` is in the last step.

        In this step, accelerate divides what is left, and adds samples of the first step.
        """
        place, size = accelerate_place(self), self.batch_size or 1
        if place is None:
            return False
        step = size * accelerate_processes(self)
        added = 0 <= first < step and first // size != place
        return added or first // step == (count - 1) // step

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume from a saved state, with any number of ranks and workers.

        Raises:
            ConfigError: The state belongs to another order: other stores, filter, seed or
                shuffling.
        """
        super().load_state_dict(state)
        self._loaded_share = tuple(state["share"]) if "share" in state else None
        self._share = None

    def _order(self, epoch: int, version: int = STATE_VERSION) -> str:
        corpus = self.corpus
        return f"{self._mixture.digest}-{corpus.digest if version > 1 else corpus.digest_of_rows}"

    def _records(self) -> list[int]:
        return self.corpus.records

    def _after(self, progress: EpochProgress, done: int) -> EpochProgress:
        """Progress after each rank has read `done` samples since `progress`."""
        rank, total = self._rank, self._mixture.total
        if done >= rank.largest_share(total - progress.position):
            return EpochProgress(progress.epoch, total)
        return EpochProgress(progress.epoch, progress.position + done * rank.world_size)


def worker_share(count: int, worker: int, workers: int, turn: int) -> int:
    """How many of `count` samples a worker gets if workers take turns of `turn` samples."""
    turns, rest = divmod(count, turn)
    mine = len(range(worker, turns, workers)) * turn
    return mine + (rest if turns % workers == worker else 0)
