"""Decides which unit a worker slot gets, and what happens to a lost unit. Uses no Ray and no clock.

The longest units go first, and each worker slot has a bounded number of them. A unit whose worker
died or failed is a suspect: it is retried alone, so that it cannot take another unit down with it.
Before its last attempt each of its items is loaded on trial. A unit that was lost with its node is
not a suspect: it goes to the front of the queue, and is given up only after many such losses. A
unit that could not be written, or whose worker could not read the source, goes to the end of the
queue and is retried a few times.
"""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from collections.abc import Collection, Hashable, Iterable
from dataclasses import dataclass
from typing import Literal

from latentmill.plan import Unit

UNITS_IN_FLIGHT = 2
MAX_ATTEMPTS = 3
MAX_NODE_LOSSES = 20
MAX_STORAGE_LOSSES = 3  # in a row before the run ends, if no worker can read and write

LossKind = Literal["worker", "node", "storage"]


@dataclass(frozen=True)
class Loss:
    """Why a unit was lost. Only a loss of kind `worker` makes the unit a suspect."""

    kind: LossKind
    reason: str


@dataclass(frozen=True)
class Assignment:
    """A unit for a worker slot. With `trial_load`, its items are loaded on trial first."""

    unit: Unit
    trial_load: bool = False


class Dispatch:
    """Queue of a run's units. A worker slot has at most `in_flight` of them at once."""

    def __init__(self, units: Iterable[Unit], in_flight: int = UNITS_IN_FLIGHT) -> None:
        order = sorted(units, key=lambda unit: (-unit.seconds, unit.number))
        self._waiting = deque(order)
        self._suspects: deque[Unit] = deque()
        self._in_flight = in_flight
        self._open = {unit.number for unit in order}
        self._unstored: set[int] = set()  # lost to the storage since the last commit
        self._losses: dict[LossKind, Counter[int]] = defaultdict(Counter)  # by unit number
        self._draining: set[Hashable] = set()  # slots that get no more units before a suspect
        self.failed: dict[str, Loss] = {}  # by unit name, the last loss

    @property
    def open(self) -> int:
        """Number of units that are neither committed nor given up."""
        return len(self._open)

    @property
    def storage_fails(self) -> bool:
        """Whether several units in a row, or all open ones, could not be read or written."""
        several = len(self._unstored) >= MAX_STORAGE_LOSSES
        return bool(self._unstored) and (several or self._unstored >= self._open)

    @property
    def queued(self) -> int:
        """Number of open units that no slot has."""
        return len(self._waiting) + len(self._suspects)

    def next(self, slot: Hashable, holding: Collection[Unit]) -> Assignment | None:
        """The next unit for a slot that has the units `holding`, or None if it gets none now."""
        if any(self._losses["worker"][unit.number] for unit in holding):
            return None
        if self._suspects:
            if not holding:
                self._draining.discard(slot)
                return self._assign(self._suspects.popleft())
            if slot in self._draining or len(self._draining) < len(self._suspects):
                self._draining.add(slot)
                return None
        else:
            self._draining.clear()
        if self._waiting and len(holding) < self._in_flight:
            return self._assign(self._waiting.popleft())
        return None

    def done(self, unit: Unit) -> None:
        """Remove a unit that was committed."""
        self._open.discard(unit.number)
        self._unstored.clear()

    def lost(self, unit: Unit, loss: Loss) -> int:
        """Queue a lost unit again, or give it up. Returns its number of losses of this kind."""
        times = self._losses[loss.kind]
        times[unit.number] += 1
        attempt = times[unit.number]
        if loss.kind == "storage":
            self._unstored.add(unit.number)
        if attempt >= (MAX_NODE_LOSSES if loss.kind == "node" else MAX_ATTEMPTS):
            self.failed[unit.name] = loss
            self._open.discard(unit.number)
        elif self._losses["worker"][unit.number]:
            self._suspects.append(unit)
        elif loss.kind == "storage":
            self._waiting.append(unit)
        else:
            self._waiting.appendleft(unit)
        return attempt

    def leave(self, slot: Hashable) -> None:
        """Forget a worker slot that was removed."""
        self._draining.discard(slot)

    def _assign(self, unit: Unit) -> Assignment:
        last_attempt = self._losses["worker"][unit.number] == MAX_ATTEMPTS - 1
        last_node = self._losses["node"][unit.number] == MAX_NODE_LOSSES - 1
        return Assignment(unit, trial_load=last_attempt or last_node)
