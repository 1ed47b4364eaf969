"""Measures whether encoding is deterministic, and whether neighbours in a batch change it."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

COPIES = 4  # elements of a batch


def distance(a: Tensor, b: Tensor) -> float:
    """||a - b|| / ||b||; the absolute distance if `b` is zero."""
    difference, size = float((a.double() - b.double()).norm()), float(b.double().norm())
    return difference / size if size else difference


@dataclass(frozen=True)
class Repeatability:
    """How equal the results of equal calls are.

    Attributes:
        same_seed: Distance of two results if the global random generators have the same state.
        other_seed: The same with another state.
        generators: Global random generators that the call changed.
    """

    same_seed: float
    other_seed: float
    generators: tuple[str, ...]


def repeatability(call: Callable[[], Tensor], between: Callable[[], object]) -> Repeatability:
    """Call a function repeatedly, with another call `between`, and compare the results.

    The state of the global random generators is restored.
    """
    kept = _states()
    try:
        _seed(1)
        before = _states()
        first = call()
        changed = tuple(name for name, state in _states().items() if not _same(state, before[name]))
        _seed(2)
        other = call()
        between()
        _seed(1)
        again = call()
    finally:
        _restore(kept)
    return Repeatability(distance(again, first), distance(other, first), changed)


def batch_size_error(encode: Callable[[Tensor], Tensor], one: Tensor) -> float:
    """Distance of the elements of a batch of equal elements from `one` (`[1, ...]`) alone."""
    alone = encode(one)
    together = encode(one.expand(COPIES, *one.shape[1:]).contiguous())
    return max(distance(element, alone[0]) for element in together)


def neighbour_error(
    encode: Callable[[Tensor], Tensor], one: Tensor, neighbours: tuple[Tensor, ...]
) -> float:
    """How much other neighbours change an element of a batch, whose size stays the same.

    The element is first and last in the batch.
    """
    size = len(neighbours) + 2
    equal = encode(one.expand(size, *one.shape[1:]).contiguous())
    mixed = encode(torch.cat((one, *neighbours, one)))
    return max(distance(mixed[0], equal[0]), distance(mixed[-1], equal[-1]))


def _states() -> dict[str, Any]:
    states: dict[str, Any] = {
        "torch": torch.get_rng_state(),
        "numpy": np.random.get_state(),
        "random": random.getstate(),
    }
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        states["torch.cuda"] = torch.stack(torch.cuda.get_rng_state_all())
    return states


def _seed(seed: int) -> None:
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)


def _restore(states: dict[str, Any]) -> None:
    torch.set_rng_state(states["torch"])
    np.random.set_state(states["numpy"])
    random.setstate(states["random"])
    if "torch.cuda" in states:
        torch.cuda.set_rng_state_all(list(states["torch.cuda"]))


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, tuple):
        return all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))
    return torch.equal(a, b)
