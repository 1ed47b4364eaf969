"""Batches that do not fit into the memory of the device are run in smaller ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from latentmill.errors import ConfigError
from latentmill.models.base import ModelSpec


class BatchRunner:
    """Runs a model on batches of up to `size`, which is halved each time that memory runs out."""

    def __init__(self, spec: ModelSpec, size: int) -> None:
        self._spec, self._size = spec, size

    def run(self, count: int, samples: int, step: Callable[[slice], Tensor]) -> Iterator[Tensor]:
        """Yield the results of `count` elements of `samples` samples each, in order.

        `step` runs the elements of a slice; its result should not be on the device any more.
        Raises ConfigError if not even one element fits.
        """
        start = 0
        while start < count:
            part = slice(start, min(count, start + self._size))
            done = _tried(step, part)
            if done is None:
                torch.cuda.empty_cache()  # not in the handler: its traceback holds activations
                self._size = (part.stop - start) // 2
                self._check(samples)
                continue
            yield from done
            start = part.stop

    def _check(self, samples: int) -> None:
        if not self._size:
            seconds = samples / self._spec.sample_rate
            raise ConfigError(
                f"Model {self._spec.name}: {seconds:.1f} s of audio at once do not fit into the "
                "memory of the GPU: use --device cpu, or device='cpu' in Python."
            )


def _tried(step: Callable[[slice], Tensor], part: slice) -> Tensor | None:
    try:
        return step(part)
    except torch.OutOfMemoryError:
        return None
