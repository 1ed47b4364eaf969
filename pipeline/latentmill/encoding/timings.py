"""What a worker has done so far, by counters, and what a run was bound by."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass, field

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
class Meter:
    """What a worker has done so far; written by its threads, read by anyone."""

    audio_seconds: float = 0.0  # encoded by the model
    read_seconds: float = 0.0  # spent until items were open, fetched included, summed over threads
    decode_seconds: float = 0.0  # spent decoding them, summed over threads
    wait_seconds: float = 0.0  # the model waited for audio
    model_seconds: float = 0.0  # the model worked, or on a GPU: it was waited for
    idle_seconds: float = 0.0  # the model had no unit, as all there were were being written
    write_seconds: float = 0.0  # spent finishing and uploading shards
    steps: int = 0  # grows whenever anything does
    parent: Meter | None = None  # counts everything too
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def add(self, name: str, seconds: float) -> None:
        """Add to one of the counters."""
        with self._lock:
            setattr(self, name, getattr(self, name) + seconds)
            self.steps += 1
        if self.parent is not None:
            self.parent.add(name, seconds)

    def snapshot(self) -> dict[str, float]:
        """The counters by name."""
        with self._lock:
            return {name: getattr(self, name) for name in COUNTERS}


WELL_FED = 0.85  # share of the time in which the model works, from which on it is the bound


def bound(stages: Mapping[str, float]) -> str | None:
    """What work was bound by, and what would help; None if nothing was done.

    Args:
        stages: Seconds by the names of `COUNTERS`, summed over units and workers.
    """
    model, wait, idle = (stages.get(f"{name}_seconds", 0.0) for name in ("model", "wait", "idle"))
    total = model + wait + idle
    if not total:
        return None
    if model >= WELL_FED * total:
        return f"bound by the model: it worked {model / total:.0%} of the time"
    if idle > wait:
        return (
            f"bound by writing: the model stood still {idle / total:.0%} of the time while shards "
            "were written; faster storage or larger units would help"
        )
    waited = f"the model waited {wait / total:.0%} of the time"
    if stages.get("read_seconds", 0.0) > stages.get("decode_seconds", 0.0):
        return f"bound by reading: {waited}; more decode threads or a nearer source would help"
    return f"bound by decoding: {waited}; more decode threads or CPU cores would help"
