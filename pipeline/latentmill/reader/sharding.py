"""Who reads what: the share of a rank in an epoch, and what an epoch consists of."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch.distributed

from latentmill.errors import ConfigError
from latentmill.reader.corpus import choice
from latentmill.reader.order import Mixture, apportion
from latentmill.reader.sample import whole_number

Even = Literal["off", "drop", "pad"]

STATE_VERSION = 1
BLOCK = 16
WINDOW = 16384


@dataclass(frozen=True)
class Rank:
    """One of `world_size` processes that train together, and how they share an epoch.

    The things of an epoch (samples or batches) are dealt in turn, as cards are: whenever all ranks
    have taken equally many, those of a first part of the epoch are taken and no others.

    Attributes:
        rank: From 0.
        world_size: How many processes.
        even: Where the number of things is no multiple of `world_size`: `off` deals every one
            exactly once, so that some ranks get one more; `drop` leaves out the last ones, `pad`
            deals the first ones of the epoch again, so that all ranks get equally many.
    """

    rank: int
    world_size: int
    even: Even

    @classmethod
    def of(cls, rank: int | None, world_size: int | None, even: Even) -> Rank:
        """As given; where it is not, as `torch.distributed` says if it is in use, else alone.

        Not to be kept where it is not given: Lightning joins the process group after the user has
        made the loaders.

        Raises:
            ConfigError: There is no such rank, only one of both is given, or another `even`.
        """
        choice("even", even, Even)
        if (rank is None) != (world_size is None):
            raise ConfigError("Give both rank and world_size, or neither.")
        if rank is None or world_size is None:
            group = torch.distributed
            together = group.is_available() and group.is_initialized()
            rank, world_size = (group.get_rank(), group.get_world_size()) if together else (0, 1)
        if not 0 <= rank < world_size:
            raise ConfigError(f"There is no rank {rank} in a world of {world_size}.")
        return cls(rank, world_size, even)

    def share(self, remaining: int) -> int:
        """How many of the things that remain of an epoch this rank gets."""
        every, rest = divmod(remaining, self.world_size)
        if self.even == "off":
            return every + (self.rank < rest)
        return every + (self.even == "pad" and rest > 0)

    def largest_share(self, remaining: int) -> int:
        """How many of them the rank gets that gets the most."""
        return replace(self, rank=0).share(remaining)


def dealt_by_accelerate(reader: object) -> int:
    """How many processes share what `reader` gives, as a loader prepared by `accelerate` does.

    1 where none is being iterated over. Each of its processes, or the first one for all, must read
    everything: what is dealt twice loses data.
    """
    module = sys.modules.get("accelerate.state")
    loader = None if module is None else module.GradientState().active_dataloader
    if module is None or loader is None:
        return 1
    found = [getattr(loader, "dataset", None), getattr(loader, "batch_sampler", None)]
    found += [getattr(one, name, None) for one in found for name in ("dataset", "batch_sampler")]
    return int(module.PartialState().num_processes) if any(reader is f for f in found) else 1


def split_by_accelerate(stream: object) -> int:
    """How many processes each read `stream` in workers of their own and keep their part of it.

    accelerate does so with `dispatch_batches=False`; 1 where none is being iterated over.
    """
    module = sys.modules.get("accelerate.state")
    loader = None if module is None else module.GradientState().active_dataloader
    shard = getattr(loader, "dataset", None)
    if getattr(shard, "dataset", None) is not stream or getattr(shard, "split_batches", True):
        return 1
    return int(getattr(shard, "num_processes", 1))


def check_dealt_once(reader: object, rank: Rank, kind: str) -> None:
    """Refuse to deal to ranks what `accelerate` deals to them, too.

    Raises:
        ConfigError: It would.
    """
    if rank.world_size > 1 and dealt_by_accelerate(reader) > 1:
        raise ConfigError(
            f"accelerate deals batches to {rank.world_size} processes and so does {kind}, which "
            f"would lose data: make it with {kind}(..., rank=0, world_size=1), or do not pass its "
            "DataLoader to prepare()."
        )


@dataclass(frozen=True)
class EpochProgress:
    """Where reading is.

    Attributes:
        epoch: The epoch.
        position: The things of the epoch before this one are read, by whichever rank.
        done: What one worker of one rank has read since, where it keeps its own account.
    """

    epoch: int = 0
    position: int = 0
    done: int = 0

    def on_epoch(self, epoch: int) -> EpochProgress:
        """The start of an epoch; of this one, where it is."""
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
    """What an epoch consists of.

    Raises:
        ConfigError: An option does not fit.
    """
    whole_number("seed", seed, least=0)
    whole_number("shuffle_block", block, least=1)
    whole_number("shuffle_window", window, least=block)
    taken = tuple(int(size) for size in sizes)
    if weights is not None:
        if len(weights) != len(sizes) or not all(0 < w < math.inf for w in weights):
            raise ConfigError(f"weights needs a number above zero for each of {len(sizes)} stores.")
        if not shuffle:
            raise ConfigError(
                "weights needs shuffle=True: without it the stores follow one another."
            )
        # A store of which `where` takes nothing leaves its share to the others.
        present = [w if size else 0.0 for w, size in zip(weights, sizes, strict=True)]
        taken = apportion(sum(taken), present)
    return Mixture(tuple(map(int, sizes)), taken, seed, shuffle, block, window // block * block)


def check_state(
    state: Mapping[str, Any], kind: str, digest: str, records: Sequence[int]
) -> EpochProgress:
    """The progress that a state dict holds.

    Args:
        state: The state.
        kind: What it must be a state of.
        digest: The digest of the present order of samples.
        records: How many records each store has now.

    Raises:
        ConfigError: It is not such a state, or the order of samples has changed.
    """
    if state.get("kind") != kind or state.get("version") != STATE_VERSION:
        raise ConfigError(f"This is not the state of a {kind} of this version of latentmill.")
    before = list(state.get("records", records))
    if state["order"] != digest and len(before) == len(records) and before != list(records):
        epoch = int(state["epoch"]) + 1
        raise ConfigError(
            f"The stores have changed since this state was saved ({sum(before)} records then, "
            f"{sum(records)} now), so that the rest of its epoch is not known: start the next one "
            f"with set_epoch({epoch}), or resume with the stores as they were."
        )
    if state["order"] != digest:
        raise ConfigError(
            "The state is of another order of samples: resume with the stores, filter, crop, mode, "
            "seed, weights and shuffling that it was saved with."
        )
    return EpochProgress(int(state["epoch"]), int(state["position"]), int(state.get("done", 0)))
