"""A worker slot: one actor, its units and its progress."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from latentmill.engine.dispatch import Assignment
from latentmill.engine.underway import UnitProgress
from latentmill.errors import LatentmillError, LoadTaskError
from latentmill.plan import Unit


@dataclass(frozen=True)
class Report:
    """Progress report of an actor.

    Attributes:
        steps: A counter that grows while the actor makes progress.
        in_flight: Progress of its units, by number.
        memory_used: Share of its host's memory that is in use, if known.
    """

    steps: int
    in_flight: dict[int, UnitProgress]
    memory_used: float | None


@dataclass(eq=False)
class WorkerSlot:
    """One actor and the units that it has. It gets units after its `ready` call has returned."""

    actor: Any
    clock: Callable[[], float] = time.monotonic
    place: str = "a worker that is starting"  # process and host, for messages
    placed: bool = False  # its process has started on a node
    ready: bool = False
    tainted: bool = False  # a call failed in its process: it gets no more units
    units: dict[Any, Assignment] = field(default_factory=dict)  # by Ray reference
    in_flight: dict[int, UnitProgress] = field(default_factory=dict)  # in the last report
    memory_used: float | None = None  # of its host, in the last report
    reporting: bool = False  # a report was requested and has not arrived
    # It could not read or write a unit, and has committed none since. While other workers go on,
    # it gets no more units before this time.
    retry_at: float | None = None
    _moved: float = 0.0
    _steps: int = 0

    @property
    def working(self) -> bool:
        """Whether it has its model, and has read and written its last unit."""
        return self.ready and self.retry_at is None

    @property
    def holding(self) -> list[Unit]:
        return [assignment.unit for assignment in self.units.values()]

    def assign(self, reference: Any, assignment: Assignment) -> None:
        if not self.units:
            self._moved = self.clock()
        self.units[reference] = assignment

    def update(self, report: Report) -> None:
        self.reporting = False
        self.in_flight |= report.in_flight
        self.memory_used = report.memory_used
        if report.steps != self._steps:
            self._steps, self._moved = report.steps, self.clock()

    @property
    def progress(self) -> dict[int, UnitProgress]:
        return {
            unit.number: self.in_flight.get(unit.number, UnitProgress(0.0, unit.seconds, 0))
            for unit in self.holding
        }

    def located(self, error: LatentmillError) -> LatentmillError:
        """An error with its process and host, unless it has a host or is from this machine."""
        host = self.place.partition(" on ")[2]
        if not self.placed or host == socket.gethostname() or host in str(error):
            return error
        if isinstance(error, LoadTaskError):  # of another host, which it names
            return error
        located = type(error)(f"{self.place}: {error}")
        located.__cause__ = error.__cause__
        return located

    def finished(self, reference: Any) -> Assignment:
        """Remove a unit whose call has ended, with a result or an error."""
        self._moved = self.clock()
        assignment = self.units.pop(reference)
        self.in_flight.pop(assignment.unit.number, None)
        return assignment

    def stalled(self, seconds: float) -> bool:
        """Whether it has units but has made no progress for this long."""
        return bool(self.units) and self.clock() - self._moved > seconds
