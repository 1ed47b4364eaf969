"""Distribution of an epoch over ranks, and the state that resumes it."""

from __future__ import annotations

import math
import sys
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch.distributed

from latentmill.errors import ConfigError
from latentmill.reader.corpus import choice
from latentmill.reader.order import Mixture, apportion
from latentmill.reader.sample import whole_number

Even = Literal["off", "drop", "pad"]

STATE_VERSION = 2  # states of version 1 have no hash of the items in `order`
BLOCK = 16
WINDOW = 16384


@dataclass(frozen=True)
class Rank:
    """One of `world_size` training processes, and how they share an epoch.

    The elements of an epoch (samples or batches) are distributed round-robin. So when all ranks
    have taken the same number, exactly the first elements of the epoch are taken.

    Attributes:
        rank: Rank of this process, from 0.
        world_size: Number of processes.
        even: What to do if the number of elements is not a multiple of `world_size`. `off` gives
            out each element exactly once, so some ranks get one more. `drop` drops the last
            elements, `pad` repeats the first ones, so all ranks get the same number.
    """

    rank: int
    world_size: int
    even: Even

    @classmethod
    def of(cls, rank: int | None, world_size: int | None, even: Even) -> Rank:
        """The given rank; else that of `torch.distributed` if initialised; else a single process.

        If the rank is not given, do not keep the result: Lightning joins the process group after
        the user has created the loaders.
        """
        choice("even", even, Even)
        if (rank is None) != (world_size is None):
            raise ConfigError("rank and world_size belong together: set both or neither.")
        if rank is None or world_size is None:
            group = torch.distributed
            together = group.is_available() and group.is_initialized()
            rank, world_size = (group.get_rank(), group.get_world_size()) if together else (0, 1)
        if not 0 <= rank < world_size:
            raise ConfigError(
                f"rank is {rank}: it must be from 0 to world_size - 1 = {world_size - 1}."
            )
        return cls(rank, world_size, even)

    def share(self, remaining: int) -> int:
        """How many of the `remaining` elements of an epoch this rank gets."""
        every, rest = divmod(remaining, self.world_size)
        if self.even == "off":
            return every + (self.rank < rest)
        return every + (self.even == "pad" and rest > 0)

    def largest_share(self, remaining: int) -> int:
        """The largest share of any rank."""
        return replace(self, rank=0).share(remaining)


def accelerate_processes(reader: object) -> int:
    """Number of processes that `accelerate` distributes the output of `reader` to.

    1 if no prepared loader of `reader` is being iterated over. accelerate needs a reader that
    yields everything: distributing twice would lose data.
    """
    module = sys.modules.get("accelerate.state")
    loader = None if module is None else module.GradientState().active_dataloader
    if module is None or loader is None:
        return 1
    found = [getattr(loader, "dataset", None), getattr(loader, "batch_sampler", None)]
    found += [getattr(one, name, None) for one in found for name in ("dataset", "batch_sampler")]
    return int(module.PartialState().num_processes) if any(reader is f for f in found) else 1


def accelerate_shards(stream: object) -> int:
    """Number of processes that each read all of `stream` in their own workers and keep a share.

    accelerate does this with `dispatch_batches=False`. 1 if no such loader is being iterated over.
    """
    module = sys.modules.get("accelerate.state")
    loader = None if module is None else module.GradientState().active_dataloader
    shard = getattr(loader, "dataset", None)
    if getattr(shard, "dataset", None) is not stream or getattr(shard, "split_batches", True):
        return 1
    return int(getattr(shard, "num_processes", 1))


def accelerate_place(reader: object) -> int | None:
    """Number of this process among those that get whole batches of `reader` from `accelerate`.

    None if it does not distribute `reader`, or divides each batch (`split_batches`).
    """
    if accelerate_processes(reader) == 1:
        return None
    module = sys.modules["accelerate.state"]
    loader = module.GradientState().active_dataloader
    parts = [loader, *(getattr(loader, name, None) for name in ("dataset", "batch_sampler"))]
    if any(getattr(part, "split_batches", False) for part in parts):
        return None
    return int(module.PartialState().process_index)


def check_distributed_once(reader: object, rank: Rank, kind: str) -> None:
    """Raise ConfigError if both `reader` and `accelerate` would distribute an epoch to ranks."""
    if rank.world_size > 1 and accelerate_processes(reader) > 1:
        raise ConfigError(
            f"accelerate and {kind} would both distribute batches to {rank.world_size} processes, "
            f"which would lose data: use {kind}(..., rank=0, world_size=1), or do not pass its "
            "DataLoader to prepare()."
        )


@dataclass(frozen=True)
class EpochProgress:
    """How much of an epoch has been read.

    Attributes:
        epoch: The epoch.
        position: All elements of the epoch before this one have been read, by any rank.
        done: Number of elements that this worker has read since `position`.
    """

    epoch: int = 0
    position: int = 0
    done: int = 0

    def on_epoch(self, epoch: int) -> EpochProgress:
        """This progress if it is in `epoch`, else the start of `epoch`."""
        return self if epoch == self.epoch else EpochProgress(epoch)


def mixture(
    sizes: Sequence[int],
    weights: Sequence[float] | None,
    seed: int,
    *,
    shuffle: bool,
    block: int,
    window: int,
) -> Mixture:
    """Check the options of an epoch and put them into a `Mixture`."""
    whole_number("seed", seed, least=0)
    whole_number("shuffle_block", block, least=1)
    whole_number("shuffle_window", window, least=block)
    taken = tuple(int(size) for size in sizes)
    if weights is not None:
        try:
            valid = len(weights) == len(sizes) and all(0 < w < math.inf for w in weights)
        except (TypeError, ValueError):  # not a list of numbers
            valid = False
        if not valid:
            raise ConfigError(f"weights needs a number above zero for each of {len(sizes)} stores.")
        if not shuffle:
            raise ConfigError(
                "weights needs shuffle=True: without shuffling, stores are read one after another."
            )
        # If `where` matches nothing in a store, the other stores get its share.
        present = [w if size else 0.0 for w, size in zip(weights, sizes, strict=True)]
        taken = apportion(sum(sizes), present)
        for number, (weight, count) in enumerate(zip(present, taken, strict=True)):
            if weight and not count:
                raise ConfigError(
                    f"weights[{number}] is {weight}, too small for an epoch of {sum(sizes)} "
                    "samples, so this store would never be read: use a larger weight, or leave the "
                    "store out."
                )
    return Mixture(tuple(map(int, sizes)), taken, seed, shuffle, block, window // block * block)


class Resumable:
    """Base of the readers that iterate over epochs, share them with other ranks and resume them."""

    _kind: ClassVar[str]  # of reader, in its state

    def __init__(self, rank: int | None, world_size: int | None, even: Even) -> None:
        self._rank_options = (rank, world_size, even)
        Rank.of(*self._rank_options)  # raises ConfigError if they are invalid
        self._next: EpochProgress | None = EpochProgress()  # start of the next iteration, if set
        self._now = EpochProgress()  # progress of the last iteration

    @abstractmethod
    def _order(self, epoch: int, version: int = STATE_VERSION) -> str:
        """A short hash of the order of an epoch, equal on all ranks, for a version of states."""

    @abstractmethod
    def _records(self) -> list[int]:
        """Number of records of each store."""

    @property
    def _rank(self) -> Rank:
        return Rank.of(*self._rank_options)

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of the next iteration; continues in it if a state of it was loaded."""
        whole_number("epoch", epoch, least=0)
        self._start_at((self._next or EpochProgress(self._now.epoch)).on_epoch(epoch))

    def _start_at(self, progress: EpochProgress) -> None:
        self._next = progress

    def _upcoming(self) -> EpochProgress:
        """Where the next iteration starts."""
        if self._next is not None:
            return self._next
        return EpochProgress(self._now.epoch + 1) if self._now.done else self._now

    def upcoming_state(self) -> dict[str, Any]:
        """The state before the next iteration."""
        return self._state(self._upcoming())

    def _state(self, progress: EpochProgress) -> dict[str, Any]:
        return {
            "kind": self._kind,
            "version": STATE_VERSION,
            "order": self._order(progress.epoch),
            "records": self._records(),
            "epoch": progress.epoch,
            "position": progress.position,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume from a saved state, with any number of ranks.

        Raises:
            ConfigError: The state belongs to another order: other stores, filter, seed, shuffling,
                batch size, buckets or sampler.
        """
        version = state.get("version")
        if state.get("kind") != self._kind or version not in (1, STATE_VERSION):
            raise ConfigError(
                f"this is not the state of a {self._kind} of this latentmill version: load one "
                "that it saved."
            )
        epoch, records = int(state["epoch"]), self._records()
        before = list(state.get("records", records))
        changed = state["order"] != self._order(epoch, version)
        if changed and len(before) == len(records) and before != records:
            raise ConfigError(
                f"the stores have changed since this state was saved ({sum(before)} records then, "
                f"{sum(records)} now), so its epoch cannot be finished: start the next epoch with "
                f"set_epoch({epoch + 1}), or resume with the stores as they were."
            )
        if changed:
            raise ConfigError(
                "the state belongs to another order of samples: resume with the stores, filter, "
                "crop, mode, seed, weights and shuffling that it was saved with."
            )
        self._start_at(EpochProgress(epoch, int(state["position"]), int(state.get("done", 0))))
