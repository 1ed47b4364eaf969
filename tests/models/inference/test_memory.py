"""Batches are halved until they fit into the memory, which is only pretended."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from latentmill.errors import ConfigError
from latentmill.models.families import mdct
from latentmill.models.inference.memory import BatchRunner

SPEC = mdct.build(hop=16, sample_rate=800).spec


class Memory:
    """Doubles numbers, up to `fits` at once."""

    def __init__(self, fits: int, count: int) -> None:
        self.fits, self.numbers, self.sizes = fits, torch.arange(count), list[int]()

    def __call__(self, part: slice) -> torch.Tensor:
        taken = self.numbers[part]
        self.sizes.append(len(taken))
        if len(taken) > self.fits:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return 2 * taken


@given(fits=st.integers(1, 9), size=st.integers(1, 9), count=st.integers(0, 20))
def test_all_elements_are_run_in_order(fits: int, size: int, count: int) -> None:
    memory, runner = Memory(fits, count), BatchRunner(SPEC, size)
    for _ in range(2):
        assert [int(one) for one in runner.run(count, 80, memory)] == [2 * n for n in range(count)]
    failed = [one for one in memory.sizes if one > fits]
    assert failed == sorted(set(failed), reverse=True)  # no size that is too large is tried again
    assert all(one <= size for one in memory.sizes)


def test_one_element_that_does_not_fit(one_sentence: Callable[[BaseException], str]) -> None:
    memory = Memory(0, 5)
    with pytest.raises(ConfigError) as caught:
        list(BatchRunner(SPEC, 4).run(5, 1200, memory))
    assert memory.sizes == [4, 2, 1]
    message = one_sentence(caught.value)
    assert message.startswith("Model mdct: 1.5 s of audio at once do not fit")
    assert "use --device cpu" in message


def test_other_errors_are_raised() -> None:
    def broken(part: slice) -> torch.Tensor:
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        list(BatchRunner(SPEC, 4).run(5, 1200, broken))
