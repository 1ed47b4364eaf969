"""Epochs and positions of samples that a plain torch sampler requests by number only.

Torch does not pass the epoch to a map-style dataset, nor how often a number was drawn. So the
processes of a DataLoader share memory: it holds the epoch of `set_epoch`, which also reaches
workers that are already running, and for the time before that one counter of draws per process.
"""

from __future__ import annotations

import operator
import warnings
from collections.abc import Sequence
from multiprocessing.context import get_spawning_popen
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from torch.utils.data import get_worker_info

from latentmill.errors import ConfigError, RepeatedEpochWarning
from latentmill.reader.order import Ints
from latentmill.reader.sample import whole_number
from latentmill.reader.sharding import EpochProgress

# Epoch, position in the epoch, and number of a sample, as `BatchSampler` requests it.
Request: TypeAlias = tuple[int, int, int]


class Requested(NamedTuple):
    """The samples of a batch: their epoch, positions in it, and numbers in the dataset."""

    epoch: int
    positions: Ints
    numbers: Ints


_PROCESSES = 64  # number of counters; more workers share them, which is harmless
_NOT_SET = -1


class _SharedIntegers:
    """Integers in memory that an object shares with its copies in worker processes."""

    def __init__(self, numbers: list[int]) -> None:
        # Torch unlinks the shared memory's name right after mapping it.
        self._memory = torch.tensor(numbers, dtype=torch.int64, device="cpu")
        self._memory.share_memory_()  # type: ignore[no-untyped-call]
        self._numbers = self._memory.numpy()

    def __getstate__(self) -> dict[str, Any]:
        # A spawned worker gets the memory itself; any other copy gets its values.
        if get_spawning_popen() is not None:
            return {"memory": self._memory}
        return {"numbers": self._numbers.tolist()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        if "numbers" in state:
            _SharedIntegers.__init__(self, state["numbers"])
        else:
            self._memory = state["memory"]
            self._numbers = self._memory.numpy()


class Draws(_SharedIntegers):
    """Epoch of a map-style dataset, and counters of drawn samples."""

    def __init__(self) -> None:
        super().__init__([_NOT_SET] + [0] * _PROCESSES)

    @property
    def epoch(self) -> int:
        """The epoch of the last `set_epoch`; 0 before it."""
        return max(0, int(self._numbers[0]))

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch in all processes."""
        self._numbers[0] = whole_number("epoch", epoch, least=0)

    def resolve(self, numbers: Sequence[int | Request], size: int) -> tuple[Ints, Ints, Ints]:
        """Return epochs, positions and numbers of samples that are requested in one call.

        If an epoch is set, the position of a number is the number itself; a repeated number in one
        call gets a position beyond the dataset. If none is set, no position is used twice. Raises
        IndexError for a number out of range, ConfigError for anything that is not a number.
        """
        if any(isinstance(number, tuple) for number in numbers):
            epochs, positions, samples = _requests(numbers).T
        else:
            samples = np.array(numbers)
            if samples.dtype.kind not in "iu" or samples.ndim != 1:
                samples = np.array([_index(number) for number in numbers])
            samples = samples.astype(np.int64)
            samples = np.where(samples < 0, samples + size, samples)
            epoch = int(self._numbers[0])
            times = (
                self._unused_counts(len(samples)) if epoch == _NOT_SET else _occurrences(samples)
            )
            positions = times * size + samples
            epochs = np.full(len(samples), max(0, epoch), np.int64)
        if len(samples) and not (samples.min() >= 0 and samples.max() < size):
            raise IndexError(f"sample number out of range: use 0 to {size - 1}")
        return epochs, positions, samples

    def _unused_counts(self, count: int) -> Ints:
        """Return `count` numbers that no process of this loader has used before."""
        worker = get_worker_info()
        slot = 0 if worker is None else 1 + worker.id % (_PROCESSES - 1)
        begin = int(self._numbers[1 + slot])
        self._numbers[1 + slot] = begin + count
        return np.arange(begin, begin + count) * _PROCESSES + slot


class Starts(_SharedIntegers):
    """Start of a stream's next iteration, as set last, and start of its last iteration."""

    def __init__(self) -> None:
        super().__init__([0, 0, 0, _NOT_SET, 0])

    def __getstate__(self) -> dict[str, Any]:
        if get_spawning_popen() is not None:
            return super().__getstate__()
        return {"numbers": [*self._numbers[:3].tolist(), _NOT_SET, 0]}

    @property
    def version(self) -> int:
        """Number of calls of `set`."""
        return int(self._numbers[0])

    @property
    def progress(self) -> EpochProgress:
        """The last start that was set."""
        return EpochProgress(int(self._numbers[1]), int(self._numbers[2]))

    def set(self, progress: EpochProgress) -> None:
        """Set the start of the next iteration in all processes."""
        self._numbers[:] = [self.version + 1, progress.epoch, progress.position, _NOT_SET, 0]

    def check_repeated(self, progress: EpochProgress) -> None:
        """Record the start of an iteration; warn if the last one had the same start."""
        here = [progress.epoch, progress.position]
        if self._numbers[3:].tolist() == here:
            warnings.warn(
                f"this DataLoader reads epoch {progress.epoch} of its LatentStream again, because "
                "it starts new workers that do not know about earlier epochs: call "
                "stream.set_epoch(epoch) before each epoch, or use persistent_workers=True.",
                RepeatedEpochWarning,
                stacklevel=3,
            )
        self._numbers[3:] = here


def _requests(numbers: Sequence[object]) -> Ints:
    """Requests of `BatchSampler` as an array `[n, 3]`."""
    for request in numbers:
        if not isinstance(request, tuple) or len(request) != 3:
            raise ConfigError(
                f"cannot read {request!r} in one batch with (epoch, position, number): request all "
                "samples of a batch by number, or all as BatchSampler does."
            )
    return np.array([[_index(part) for part in request] for request in numbers], np.int64)  # type: ignore[attr-defined]


def _occurrences(samples: Ints) -> Ints:
    """How often each sample occurred earlier in the same call."""
    before: Ints = np.zeros(len(samples), np.int64)
    if len(samples) > 1:
        order = np.argsort(samples, kind="stable")
        ordered = samples[order]
        starts = np.maximum.accumulate(
            np.where(np.diff(ordered, prepend=ordered[0] - 1), np.arange(len(ordered)), 0)
        )
        before[order] = np.arange(len(ordered)) - starts
    return before


def _index(number: object) -> int:
    try:
        return operator.index(number)  # type: ignore[arg-type]
    except TypeError as error:
        raise ConfigError(
            f"{number!r} is not a sample number: samples are read by number, as in dataset[0], "
            "and records by key, as in store[key]."
        ) from error
