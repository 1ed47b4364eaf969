"""What is random about a sample that a plain sampler asks for by its number alone.

A map-style dataset is not told which epoch it is, nor how often a number was drawn. The processes
of a DataLoader therefore share an epoch, which `set_epoch` sets also for workers that are already
running, and, as long as no epoch was set, counters of the samples that each has drawn.
"""

from __future__ import annotations

import operator
import warnings
from collections import Counter
from collections.abc import Sequence
from multiprocessing.context import get_spawning_popen
from typing import Any, TypeAlias

import numpy as np
import torch
from torch.utils.data import get_worker_info

from latentmill.errors import ConfigError, RepeatedEpochWarning
from latentmill.reader.order import Ints
from latentmill.reader.sample import whole_number
from latentmill.reader.sharding import Progress

# Epoch, position in it, and number of a sample: what `BatchSampler` asks for.
Ask: TypeAlias = tuple[int, int, int]

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

    def asked(self, numbers: Sequence[int | Ask], size: int) -> tuple[Ints, Ints, Ints]:
        """Epochs, positions and numbers of samples that are asked for together.

        With an epoch, a number's position is the number itself, and for a number that comes again
        in the same call one that is beyond the dataset. Without, positions never come again.

        Raises:
            IndexError: There is no such sample.
            ConfigError: Something else than a number is asked for.
        """
        epoch, turns = int(self._numbers[0]), self._turns(numbers)
        times: Counter[int] = Counter()
        asked = []
        for number, turn in zip(numbers, turns, strict=True):
            if isinstance(number, tuple):
                asked.append(number)
                continue
            found = _index(number)
            found += size if -size <= found < 0 else 0
            if epoch == _NOT_SET:
                asked.append((0, turn * size + found, found))
            else:
                asked.append((epoch, times[found] * size + found, found))
                times[found] += 1
        epochs, positions, samples = np.array(asked, np.int64).reshape(-1, 3).T
        if len(samples) and not (samples.min() >= 0 and samples.max() < size):
            raise IndexError(f"There are samples 0 to {size - 1}")
        return epochs, positions, samples

    def _turns(self, numbers: Sequence[int | Ask]) -> range:
        """A number for each sample that no process of this loader has given to another."""
        worker = get_worker_info()
        slot = 0 if worker is None else 1 + worker.id % (_PROCESSES - 1)
        begin = int(self._numbers[1 + slot])
        self._numbers[1 + slot] = end = begin + len(numbers)
        return range(begin * _PROCESSES + slot, end * _PROCESSES + slot, _PROCESSES)


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
    def progress(self) -> Progress:
        """The start that was set last."""
        return Progress(int(self._numbers[1]), int(self._numbers[2]))

    def set(self, progress: Progress) -> None:
        """Set where the next iteration starts, for all processes."""
        self._numbers[:] = [self.version + 1, progress.epoch, progress.position, _NOT_SET, 0]

    def note(self, progress: Progress) -> None:
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


def _index(number: object) -> int:
    try:
        return operator.index(number)  # type: ignore[arg-type]
    except TypeError as error:
        raise ConfigError(
            f"{number!r} is not the number of a sample: samples are read by number, dataset[0]; "
            "records by key, store[key]."
        ) from error
