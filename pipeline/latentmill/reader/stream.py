"""The iterable dataset: shuffled, mixed, sharded over ranks and workers, resumable."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from torch.utils.data import IterableDataset, get_worker_info

import latentmill.reader.collate  # noqa: F401  a loader without collate_fn uses it too
from latentmill.errors import ConfigError
from latentmill.reader.corpus import Corpus, Mode, Reading, Stores
from latentmill.reader.draws import Starts
from latentmill.reader.fields import Where
from latentmill.reader.order import EpochOrder, Ints
from latentmill.reader.sample import Sample, Transform, whole_number
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
    split_by_accelerate,
)
from latentmill.text.shown import Shown

READ_TOGETHER = 32  # samples that are read in one batch of requests


class LatentStream(Shown, IterableDataset[Sample]):
    """Epochs of samples of one or several stores; see `LatentDataset` for how they are read.

    The order of an epoch is a pure function of stores, seed and epoch. Its samples are dealt to
    the ranks in turn, and a rank's to its DataLoader workers: all of an epoch exactly once,
    whatever their numbers. With `batch_size` the workers take turns by whole batches, so that the
    batches of a loader are those of one process, and `state_after` can say where training is.

    Every iteration is the next epoch. A DataLoader starts new workers for every epoch, as copies
    of this object, unless it has `persistent_workers=True`: without it, call `set_epoch` before
    each epoch. A loader that reads the same epoch again without that warns.

    Args:
        stores: A store or several, open or by path or URL; all of one model.
        weights: How often samples of each store are drawn, relative to the others; then an epoch
            has as many samples as the stores together, and epochs go on in each store where the
            last one stopped, so that every pass through a store has every sample once. None: an
            epoch is every sample of every store, once.
        crop: As in `LatentDataset`; so is `mode`.
        shuffle: Whether to shuffle; otherwise store after store, as they lie in the shards.
        shuffle_block: Neighbours that are shuffled together; 1 shuffles an epoch as a whole.
        shuffle_window: Samples that are shuffled one by one after that.
        seed: Of the order, the random crops and the transforms.
        rank: This process among those that train together; None: as `torch.distributed` says.
        world_size: How many they are.
        even: What happens to a rest that cannot be dealt evenly: see `Rank`.
        batch_size: That of the DataLoader.
        where: As in `LatentDataset`; so are `metadata`, `transforms`, `cache` and `cache_gib`.

    Raises:
        ConfigError, StoreError: As `LatentDataset`.
    """

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
        cache: str | os.PathLike[str] | None = None,
        cache_gib: float = 50.0,
    ) -> None:
        reading = Reading(crop, mode, seed, metadata, tuple(transforms))
        self._asked = (rank, world_size, even)
        Rank.of(*self._asked)  # refuses what cannot be
        if batch_size is not None:
            whole_number("batch_size", batch_size, least=1)
        self._batch_size = batch_size
        self.corpus = Corpus(stores, reading, where=where, cache=cache, cache_gib=cache_gib)
        sizes = [len(source) for source in self.corpus.sources]
        self._mixture = mixture(
            sizes, weights, seed, shuffle=shuffle, block=shuffle_block, window=shuffle_window
        )
        self._next: EpochProgress | None = EpochProgress()
        self._now = EpochProgress()
        self._starts, self._version = Starts(), 0
        self._share: tuple[int, ...] | None = None  # whose the account in `_now` is
        self._loaded_share: tuple[int, ...] | None = None
        self._split = 1

    def __getstate__(self) -> dict[str, Any]:
        # A spawned worker is in no process group and knows no accelerate: it is told.
        state, rank = self.__dict__ | {"_split": split_by_accelerate(self)}, self._rank
        if rank.world_size > 1:
            state["_asked"] = (rank.rank, rank.world_size, rank.even)
        return state

    @property
    def _rank(self) -> Rank:
        return Rank.of(*self._asked)

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of the next iteration. After `load_state_dict`, the same one goes on."""
        whole_number("epoch", epoch, least=0)
        known = self._next or EpochProgress(self._now.epoch)
        self._start_at(known.on_epoch(epoch))

    def shown(self) -> Mapping[str, object]:
        """What `repr` and a notebook show."""
        return {
            "samples": self._mixture.total,
            **self.corpus.shown(),
            "shuffle": self._mixture.shuffle,
            "seed": self._mixture.seed,
        }

    def __len__(self) -> int:
        """Samples that the next iteration gives to this rank."""
        return self._rank.share(self._mixture.total - self._upcoming().position)

    def __iter__(self) -> Iterator[Sample]:
        worker = get_worker_info()
        id_, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        # accelerate takes one batch for each process from each worker's samples.
        run = (self._batch_size or 1) * max(self._split, split_by_accelerate(self))
        share = (self._rank.rank, self._rank.world_size, id_, workers, run)
        check_dealt_once(self, self._rank, "LatentStream")
        self._now, self._next = self._upcoming(), None
        if worker and id_ == 0 and self._random:
            self._starts.note(self._now)
        if self._now.done and self._loaded_share != share:
            raise ConfigError(
                "The state is that of one DataLoader worker among others: resume with as many "
                "ranks, workers and the batch size that it was saved with, or save `state_after`."
            )
        self._share = share
        return self._samples(self._now.epoch, self._now.position, id_, workers, run)

    def _start_at(self, progress: EpochProgress) -> None:
        self._next = progress
        if get_worker_info() is None:  # torchdata sets each worker's own state in it
            self._starts.set(progress)
            self._version = self._starts.version

    @property
    def _random(self) -> bool:
        """Whether epochs differ."""
        reading = self.corpus.reading
        crops = reading.crop is not None and reading.mode == "random"
        return self._mixture.shuffle or crops or bool(reading.transforms)

    def _upcoming(self) -> EpochProgress:
        if self._version != self._starts.version:  # set since this worker was started
            self._version, self._next = self._starts.version, self._starts.progress
        if self._next is not None:
            return self._next
        return EpochProgress(self._now.epoch + 1) if self._now.done else self._now

    def _samples(
        self, epoch: int, start: int, worker: int, workers: int, run: int
    ) -> Iterator[Sample]:
        order, total = EpochOrder(self._mixture, epoch), self._mixture.total
        rank = self._rank
        count = worker_share(rank.share(total - start), worker, workers, run)
        together = max(READ_TOGETHER, run)
        while self._now.done < count:
            last = min(self._now.done + together, count)
            turns = np.arange(self._now.done, last)
            local = (turns // run * workers + worker) * run + turns % run
            positions: Ints = start + rank.rank + local * rank.world_size
            sources, samples = order.at(positions % total)
            for sample in self.corpus.read(sources, samples, epoch, positions):
                self._now = EpochProgress(epoch, start, self._now.done + 1)
                yield sample
        if not count:  # none of the rest was for this worker: it goes on with the others
            self._next = EpochProgress(epoch + 1)

    def state_dict(self) -> dict[str, Any]:
        """Where this process's own iteration is, exactly.

        For a loop over the stream itself or a DataLoader without workers, and for torchdata's
        StatefulDataLoader, which calls it in the workers. What a plain DataLoader's workers have
        read ahead this object cannot know: there, save `state_after(batch)`.

        Raises:
            ConfigError: The stream has not been iterated over in this process.
        """
        if self._share is None:
            raise ConfigError(
                "This stream was not iterated over in this process (a DataLoader's workers have "
                "copies of it): save state_after(batch) with the last batch that was trained on."
            )
        if self._share[3] > 1:
            return self._state(self._now) | {"done": self._now.done, "share": list(self._share)}
        return self._state(self._after(self._now, self._now.done))

    def state_after(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Where training is when all ranks have trained on their batch of this step.

        Args:
            batch: This rank's last batch, from `collate`.

        Raises:
            ConfigError: The loader's batches are not those of one process: `batch_size` is needed.
        """
        epoch, positions = int(batch["epoch"][0]), np.asarray(batch["position"])
        start = (self._next or self._now).on_epoch(epoch).position
        rank, run = self._rank, self._batch_size or 1
        local, wrong = np.divmod(positions - start - rank.rank, rank.world_size)
        count = rank.share(self._mixture.total - start)
        first, last = int(local[0]), int(local[-1]) + 1
        whole = self._batch_size is None or (
            first % self._batch_size == 0 and (len(local) == self._batch_size or last == count)
        )
        if wrong.any() or (np.diff(local) != 1).any() or not whole or last > count:
            raise ConfigError(
                "After this batch it cannot be said what was read: give LatentStream the "
                "DataLoader's batch_size and do not reorder batches."
            )
        # A last batch that is not full is that of all ranks, one of which may have one sample more.
        step = run * dealt_by_accelerate(self)
        return self._state(self._after(EpochProgress(epoch, start), -(-last // step) * step))

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where a state was saved, with any number of ranks and workers.

        Raises:
            ConfigError: The state is of another order: other stores, filter, seed or shuffling.
        """
        self._start_at(check_state(state, "stream", self._digest, self.corpus.records))
        self._loaded_share = tuple(state["share"]) if "share" in state else None
        self._share = None

    @property
    def _digest(self) -> str:
        return f"{self._mixture.digest}-{self.corpus.digest}"

    def _after(self, progress: EpochProgress, done: int) -> EpochProgress:
        """All ranks' progress, when each has read `done` samples since `progress`."""
        rank, total = self._rank, self._mixture.total
        if done >= rank.largest_share(total - progress.position):
            return EpochProgress(progress.epoch, total)
        return EpochProgress(progress.epoch, progress.position + done * rank.world_size)

    def _state(self, progress: EpochProgress) -> dict[str, Any]:
        return {
            "kind": "stream",
            "version": STATE_VERSION,
            "order": self._digest,
            "records": self.corpus.records,
            "epoch": progress.epoch,
            "position": progress.position,
        }


def worker_share(count: int, worker: int, workers: int, run: int) -> int:
    """How many of `count` samples a worker gets, dealt in turn in runs of `run` samples."""
    runs, rest = divmod(count, run)
    mine = len(range(worker, runs, workers)) * run
    return mine + (rest if runs % workers == worker else 0)
