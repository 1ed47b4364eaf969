"""What is random about a sample that a plain sampler asks for by its number alone.

A map-style dataset is not told which epoch it is, nor how often a number was drawn. The processes
of a DataLoader therefore share an epoch, which `set_epoch` sets also for workers that are already
running, and, as long as no epoch was set, counters of the samples that each has drawn.
"""

from __future__ import annotations

import operator
import warnings
from collections.abc import Sequence
from multiprocessing.context import get_spawning_popen
from typing import Any, TypeAlias

import numpy as np
import torch
from torch.utils.data import get_worker_info

from latentmill.errors import ConfigError, RepeatedEpochWarning
from latentmill.reader.order import Ints
from latentmill.reader.sample import whole_number
from latentmill.reader.sharding import EpochProgress

# Epoch, position in it, and number of a sample: what `BatchSampler` asks for.
Request: TypeAlias = tuple[int, int, int]

_PROCESSES = 64  # with a counter of their own; further workers share them, which does no harm
_NOT_SET = -1


class _Shared:
    """Some integers in memory that an object and its copies in worker processes share."""

    def __init__(self, numbers: list[int]) -> None:
        self._share(numbers)

    def _share(self, numbers: list[int]) -> None:
        # Torch unlinks the name of the memory as soon as it is mapped.
        self._memory = torch.tensor(numbers, dtype=torch.int64)
        self._memory.share_memory_()  # type: ignore[no-untyped-call]
        self._numbers = self._memory.numpy()

    def __getstate__(self) -> dict[str, Any]:
        # A worker that is being spawned gets the memory, any other copy gets what is in it.
        if get_spawning_popen() is not None:
            return {"memory": self._memory}
        return {"numbers": self._numbers.tolist()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        if "numbers" in state:
            self._share(state["numbers"])
        else:
            self._memory = state["memory"]
            self._numbers = self._memory.numpy()


class Draws(_Shared):
    """The epoch of a map-style dataset, and counters of the samples that were drawn."""

    def __init__(self) -> None:
        super().__init__([_NOT_SET] + [0] * _PROCESSES)

    @property
    def epoch(self) -> int:
        """The epoch that was set last; 0 if none was."""
        return max(0, int(self._numbers[0]))

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch, for all processes."""
        self._numbers[0] = whole_number("epoch", epoch, least=0)

    def asked(self, numbers: Sequence[int | Request], size: int) -> tuple[Ints, Ints, Ints]:
        """Epochs, positions and numbers of samples that are asked for together.

        With an epoch, a number's position is the number itself, and for a number that comes again
        in the same call one that is beyond the dataset. Without, positions never come again.

        Raises:
            IndexError: There is no such sample.
            ConfigError: Something else than a number is asked for.
        """
        if any(isinstance(number, tuple) for number in numbers):
            epochs, positions, samples = _asks(numbers).T
        else:
            samples = _indices(numbers)
            samples = np.where(samples < 0, samples + size, samples)
            epoch = int(self._numbers[0])
            times = self._turns(len(samples)) if epoch == _NOT_SET else _occurrences(samples)
            positions = times * size + samples
            epochs = np.full(len(samples), max(0, epoch), np.int64)
        if len(samples) and not (samples.min() >= 0 and samples.max() < size):
            raise IndexError(f"There are samples 0 to {size - 1}")
        return epochs, positions, samples

    def _turns(self, count: int) -> Ints:
        """Numbers that no process of this loader has given to another sample."""
        worker = get_worker_info()
        slot = 0 if worker is None else 1 + worker.id % (_PROCESSES - 1)
        begin = int(self._numbers[1 + slot])
        self._numbers[1 + slot] = begin + count
        return np.arange(begin, begin + count) * _PROCESSES + slot


class Starts(_Shared):
    """Where a stream's iterations start: what was set last, and where the last one started."""

    def __init__(self) -> None:
        super().__init__([0, 0, 0, _NOT_SET, 0])

    def __getstate__(self) -> dict[str, Any]:
        if get_spawning_popen() is not None:
            return super().__getstate__()
        return {"numbers": [*self._numbers[:3].tolist(), _NOT_SET, 0]}

    @property
    def version(self) -> int:
        """How often a start was set."""
        return int(self._numbers[0])

    @property
    def progress(self) -> EpochProgress:
        """The start that was set last."""
        return EpochProgress(int(self._numbers[1]), int(self._numbers[2]))

    def set(self, progress: EpochProgress) -> None:
        """Set where the next iteration starts, for all processes."""
        self._numbers[:] = [self.version + 1, progress.epoch, progress.position, _NOT_SET, 0]

    def note(self, progress: EpochProgress) -> None:
        """Take note that an iteration starts, and warn if the last one started there too."""
        here = [progress.epoch, progress.position]
        if self._numbers[3:].tolist() == here:
            warnings.warn(
                f"This DataLoader reads epoch {progress.epoch} of its LatentStream again, because "
                "it starts new workers, which do not know of earlier epochs: call "
                "stream.set_epoch(epoch) before each epoch, or use persistent_workers=True.",
                RepeatedEpochWarning,
                stacklevel=3,
            )
        self._numbers[3:] = here


def _asks(numbers: Sequence[object]) -> Ints:
    """What `BatchSampler` asks for, `[n, 3]`."""
    for ask in numbers:
        if not isinstance(ask, tuple) or len(ask) != 3:
            raise ConfigError(
                f"{ask!r} is asked for together with (epoch, position, number): ask for all "
                "samples of a batch by number, or for all as BatchSampler does."
            )
    return np.array([[_index(part) for part in ask] for ask in numbers], np.int64)  # type: ignore[attr-defined]


def _indices(numbers: Sequence[object]) -> Ints:
    found = np.array(numbers)
    if found.dtype.kind in "iu" and found.ndim == 1:
        return found.astype(np.int64)
    return np.array([_index(number) for number in numbers], np.int64)


def _occurrences(samples: Ints) -> Ints:
    """How often each sample came before in the same call."""
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
            f"{number!r} is not the number of a sample: samples are read by number, dataset[0]; "
            "records by key, store[key]."
        ) from error
