"""Counters of a worker's time, and the bottleneck of a run."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

T = TypeVar("T")

COUNTERS = (
    "audio_seconds",
    "read_seconds",
    "decode_seconds",
    "wait_seconds",
    "model_seconds",
    "idle_seconds",
    "write_seconds",
)


@dataclass
class Timings:
    """Counters of a worker or a unit. Thread-safe. Commits store them under these names."""

    audio_seconds: float = 0.0  # audio that the model has encoded
    read_seconds: float = 0.0  # fetching and opening items, summed over threads
    decode_seconds: float = 0.0  # loading the audio of opened items, summed over threads
    wait_seconds: float = 0.0  # the model waited for audio
    model_seconds: float = 0.0  # the model encoded; on a GPU, time waiting for its results
    idle_seconds: float = 0.0  # the model had no unit, because all units were being written
    write_seconds: float = 0.0  # finishing and uploading shards
    steps: int = 0  # grows with any progress
    parent: Timings | None = None  # receives every `add` too
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def add(self, name: str, seconds: float) -> None:
        with self._lock:
            setattr(self, name, getattr(self, name) + seconds)
            self.steps += 1
        if self.parent is not None:
            self.parent.add(name, seconds)

    def step(self) -> None:
        """Count progress that no counter measures, such as bytes that have arrived."""
        with self._lock:
            self.steps += 1
        if self.parent is not None:
            self.parent.step()

    def stepping(self, values: Iterable[T]) -> Iterator[T]:
        """Yield values; each of them counts as progress."""
        for value in values:
            self.step()
            yield value

    def snapshot(self) -> dict[str, float]:
        with self._lock:
            return {name: getattr(self, name) for name in COUNTERS}


MODEL_BOUND = 0.85  # share of model time from which the model is the bottleneck


def bound(stages: Mapping[str, float]) -> str | None:
    """The bottleneck and what would help, for messages; None if nothing was encoded.

    `stages` has seconds by the names of `COUNTERS`, summed over units and workers.
    """
    model, wait, idle = (stages.get(f"{name}_seconds", 0.0) for name in ("model", "wait", "idle"))
    total = model + wait + idle
    if not total:
        return None
    if model >= MODEL_BOUND * total:
        return f"bound by the model: it was busy {model / total:.0%} of the time"
    if idle > wait:
        return (
            f"bound by writing: the model was idle {idle / total:.0%} of the time while shards "
            "were written; faster storage or larger units would help"
        )
    waited = f"the model waited {wait / total:.0%} of the time"
    if stages.get("read_seconds", 0.0) > stages.get("decode_seconds", 0.0):
        return f"bound by reading: {waited}; more load threads or a nearer source would help"
    return f"bound by loading: {waited}; more load threads or CPU cores would help"
