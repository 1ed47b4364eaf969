"""A seat: one actor, what it was asked, and how far it is."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from latentmill.engine.dispatch import Assignment
from latentmill.plan import Unit


@dataclass(eq=False)
class Seat:
    """One actor with the units that it has. It is given units once it has said that it is ready."""

    actor: Any
    clock: Callable[[], float] = time.monotonic
    place: str = "a worker that is starting"  # host and process, for people
    ready: bool = False
    tainted: bool = False  # something failed in it: it takes no more units
    units: dict[Any, Assignment] = field(default_factory=dict)  # by Ray reference
    audio_seconds: float = 0.0  # what it has encoded, as last asked
    memory_used: float | None = None  # of its host, as last asked
    asking: bool = False  # how far it is
    _moved: float = 0.0
    _steps: float = 0.0

    @property
    def holding(self) -> list[Unit]:
        """The units that it has."""
        return [assignment.unit for assignment in self.units.values()]

    def give(self, reference: Any, assignment: Assignment) -> None:
        """It was given a unit."""
        if not self.units:
            self._moved = self.clock()
        self.units[reference] = assignment

    def heard(self, meter: dict[str, float]) -> None:
        """It said how far it is."""
        self.asking = False
        self.audio_seconds = meter.get("audio_seconds", self.audio_seconds)
        self.memory_used = meter.get("memory_used")
        steps = meter.get("steps", 0.0)
        if steps != self._steps:
            self._steps, self._moved = steps, self.clock()

    def finished(self, reference: Any) -> Assignment:
        """A unit came to its end, one way or the other."""
        self._moved = self.clock()
        return self.units.pop(reference)

    def stalled(self, seconds: float) -> bool:
        """Whether it has units, and nothing has moved in it for so long."""
        return bool(self.units) and self.clock() - self._moved > seconds
