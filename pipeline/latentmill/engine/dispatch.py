"""Which unit a worker slot gets, and what happens to a lost unit. Knows no Ray and no clock.

Longest first, a bounded number per worker slot. A unit whose worker died or failed while it had the
unit is a suspect: it is retried alone, so that it takes no other unit down with it, and for its
last attempt each of its items is loaded on trial first. A unit that was lost with its node is no
suspect; it goes to the front of the queue, and is given up only after many such losses. A unit that
could not be written waits for the others and is retried a few times; if nothing can be written, the
run ends.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Collection, Hashable, Iterable
from dataclasses import dataclass
from typing import Literal

from latentmill.plan import Unit

UNITS_IN_FLIGHT = 2
MAX_ATTEMPTS = 3
MAX_NODE_LOSSES = 20
MAX_UNWRITTEN = 3  # units in a row that cannot be written, until it is the storage's fault

LossKind = Literal["worker", "node", "storage"]


@dataclass(frozen=True)
class Loss:
    """Why a unit was lost: its worker (so that it is a suspect), the node under it, or storage."""

    kind: LossKind
    reason: str


@dataclass(frozen=True)
class Assignment:
    """A unit for a worker slot; if `trial_load`, its items are loaded on trial first."""

    unit: Unit
    trial_load: bool = False


class Dispatch:
    """The units of a run on their way to their commits.

    Args:
        units: What there is to do.
        in_flight: Units that a worker slot may have at once.
    """

    def __init__(self, units: Iterable[Unit], in_flight: int = UNITS_IN_FLIGHT) -> None:
        order = sorted(units, key=lambda unit: (-unit.seconds, unit.number))
        self._waiting = deque(order)
        self._suspects: deque[Unit] = deque()
        self._in_flight = in_flight
        self._open = {unit.number for unit in order}
        self._unwritten: set[int] = set()  # since the last commit
        self._losses: dict[LossKind, Counter[int]] = {
            "worker": Counter(),
            "node": Counter(),
            "storage": Counter(),
        }
        self._draining: set[Hashable] = set()  # slots that will be empty for a suspect
        self.failed: dict[str, Loss] = {}  # by unit name, the last loss

    @property
    def open(self) -> int:
        """Units that are neither committed nor given up."""
        return len(self._open)

    @property
    def unwritable(self) -> bool:
        """Whether several units in a row, or all that are open, could not be written."""
        several = len(self._unwritten) >= MAX_UNWRITTEN
        return bool(self._open) and (several or self._unwritten >= self._open)

    @property
    def queued(self) -> int:
        """Open units that no slot holds."""
        return len(self._waiting) + len(self._suspects)

    def next(self, slot: Hashable, holding: Collection[Unit]) -> Assignment | None:
        """The next unit for a worker slot that holds some already; None if it gets no more now."""
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
        """A unit was committed."""
        self._open.discard(unit.number)
        self._unwritten.clear()

    def lost(self, unit: Unit, loss: Loss) -> int:
        """A unit was lost; it is queued again, or given up. Gives how often it was, in this way."""
        times = self._losses[loss.kind]
        times[unit.number] += 1
        attempt = times[unit.number]
        if loss.kind == "storage":
            self._unwritten.add(unit.number)
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
        """A worker slot is gone."""
        self._draining.discard(slot)

    def _assign(self, unit: Unit) -> Assignment:
        last_attempt = self._losses["worker"][unit.number] == MAX_ATTEMPTS - 1
        last_node = self._losses["node"][unit.number] == MAX_NODE_LOSSES - 1
        return Assignment(unit, trial_load=last_attempt or last_node)
