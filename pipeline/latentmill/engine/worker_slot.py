"""A worker slot: one actor, what it was asked, and how far it is."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from latentmill.engine.dispatch import Assignment
from latentmill.engine.underway import UnitProgress
from latentmill.plan import Unit


@dataclass(frozen=True)
class Report:
    """What an actor answers when it is asked how far it is.

    Attributes:
        steps: Grows as long as anything goes on.
        in_flight: How far its units are, by number.
        memory_used: Share of its host's memory that is in use, if known.
    """

    steps: int
    in_flight: dict[int, UnitProgress]
    memory_used: float | None


@dataclass(eq=False)
class WorkerSlot:
    """One actor with the units that it has. It is given units once it has said that it is ready."""

    actor: Any
    clock: Callable[[], float] = time.monotonic
    place: str = "a worker that is starting"  # host and process, for people
    ready: bool = False
    tainted: bool = False  # something failed in it: it takes no more units
    units: dict[Any, Assignment] = field(default_factory=dict)  # by Ray reference
    in_flight: dict[int, UnitProgress] = field(default_factory=dict)  # as last asked
    memory_used: float | None = None  # of its host, as last asked
    asking: bool = False  # how far it is
    _moved: float = 0.0
    _steps: int = 0

    @property
    def holding(self) -> list[Unit]:
        """The units that it has."""
        return [assignment.unit for assignment in self.units.values()]

    def give(self, reference: Any, assignment: Assignment) -> None:
        """It was given a unit."""
        if not self.units:
            self._moved = self.clock()
        self.units[reference] = assignment

    def heard(self, report: Report) -> None:
        """Take the actor's report."""
        self.asking = False
        self.in_flight |= report.in_flight
        self.memory_used = report.memory_used
        if report.steps != self._steps:
            self._steps, self._moved = report.steps, self.clock()

    @property
    def progress(self) -> dict[int, UnitProgress]:
        """How far each unit is that it has, by number."""
        return {
            unit.number: self.in_flight.get(unit.number, UnitProgress(0.0, unit.seconds, 0))
            for unit in self.holding
        }

    def finished(self, reference: Any) -> Assignment:
        """A unit came to its end, one way or the other."""
        self._moved = self.clock()
        assignment = self.units.pop(reference)
        self.in_flight.pop(assignment.unit.number, None)
        return assignment

    def stalled(self, seconds: float) -> bool:
        """Whether it has units, and nothing has moved in it for so long."""
        return bool(self.units) and self.clock() - self._moved > seconds
