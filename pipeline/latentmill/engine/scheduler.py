"""Handing units to actors: longest first, a bounded number in flight, lost ones again elsewhere."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import ray
from ray.exceptions import RayActorError, RayError, RayTaskError

from latentmill.engine.actor import UNITS_IN_FLIGHT, ActorShape, start_actor
from latentmill.engine.worker import Job, UnitResult
from latentmill.errors import LatentmillError, UnitsFailedError
from latentmill.plan import Unit

MAX_ATTEMPTS = 3
POLL_SECONDS = 0.5


class Watcher(Protocol):
    """Who is told how the run goes; called from the driver's thread."""

    def unit_done(self, result: UnitResult) -> None:
        """A unit was committed."""

    def unit_lost(self, unit: Unit, attempt: int, reason: str) -> None:
        """A unit was lost with its actor; it is tried again if attempts are left."""

    def tick(self, audio_seconds: float) -> None:
        """Seconds of audio that the actors have encoded, units in flight included."""


@dataclass
class _Seat:
    """One place for an actor. When its actor dies, another one takes the seat."""

    actor: Any
    units: dict[Any, Unit] = field(default_factory=dict)  # by Ray reference
    counted: float = 0.0  # audio seconds that its earlier actors encoded
    seen: float = 0.0  # audio seconds of the present actor, as last asked
    asked: Any = None  # reference of the open question


@dataclass
class Scheduler:
    """Runs units to their commits on a fixed number of actors.

    Attributes:
        job: What actors need to know.
        shape: What Ray reserves for an actor.
        workers: How many actors.
        watcher: Who is told.
    """

    job: Job
    shape: ActorShape
    workers: int
    watcher: Watcher
    failed: dict[str, str] = field(default_factory=dict)  # unit name: why

    def run(
        self,
        units: Sequence[Unit],
        on_origin: Callable[[npt.NDArray[np.float32]], None] | None = None,
    ) -> None:
        """Run all units. `on_origin` gets the model's latent of silence before any unit starts.

        Raises:
            StorageError: The store cannot be written.
            ModelError: The model cannot be loaded.
            UnitsFailedError: Units failed on every attempt; all others are committed.
        """
        waiting = deque(sorted(units, key=lambda unit: (-unit.seconds, unit.number)))
        attempts: dict[int, int] = {}
        seats = [
            _Seat(start_actor(self.job, self.shape)) for _ in range(min(self.workers, len(units)))
        ]
        try:
            if on_origin is not None:
                on_origin(_get(seats[0].actor.origin.remote()))
            while waiting or any(seat.units for seat in seats):
                for seat in seats:
                    while waiting and len(seat.units) < UNITS_IN_FLIGHT:
                        unit = waiting.popleft()
                        seat.units[seat.actor.encode.remote(unit)] = unit
                self._wait(seats, waiting, attempts)
        finally:
            for seat in seats:
                ray.kill(seat.actor)
        if self.failed:
            name, reason = next(iter(self.failed.items()))
            raise UnitsFailedError(
                f"{len(self.failed)} of {len(units)} units failed on {MAX_ATTEMPTS} attempts each "
                f"(unit {name}: {reason}); the others are committed. Run again to try them again."
            )

    def _wait(self, seats: list[_Seat], waiting: deque[Unit], attempts: dict[int, int]) -> None:
        owners = {reference: seat for seat in seats for reference in seat.units}
        ready, _ = ray.wait(list(owners), num_returns=1, timeout=POLL_SECONDS)
        for reference in ready:
            seat = owners[reference]
            if reference not in seat.units:
                continue  # lost together with another unit of its actor
            try:
                result = ray.get(reference)
            except RayActorError as error:
                self._replace(seat, waiting, attempts, _first_line(error))
            except RayTaskError as error:
                unit = seat.units.pop(reference)
                if isinstance(error.cause, LatentmillError):
                    raise error.cause from error
                self._retry(unit, waiting, attempts, _first_line(error.cause))
            else:
                del seat.units[reference]
                self.watcher.unit_done(result)
        self._ask(seats)

    def _replace(
        self, seat: _Seat, waiting: deque[Unit], attempts: dict[int, int], reason: str
    ) -> None:
        """Put a new actor into the seat of a dead one and give its units back."""
        ray.kill(seat.actor)
        lost = list(seat.units.values())
        seat.units.clear()
        seat.counted, seat.seen, seat.asked = seat.counted + seat.seen, 0.0, None
        for unit in reversed(lost):
            self._retry(unit, waiting, attempts, reason)
        seat.actor = start_actor(self.job, self.shape)

    def _retry(
        self, unit: Unit, waiting: deque[Unit], attempts: dict[int, int], reason: str
    ) -> None:
        attempt = attempts[unit.number] = attempts.get(unit.number, 0) + 1
        self.watcher.unit_lost(unit, attempt, reason)
        if attempt < MAX_ATTEMPTS:
            waiting.appendleft(unit)
        else:
            self.failed[unit.name] = reason

    def _ask(self, seats: list[_Seat]) -> None:
        """Ask the actors how far they are, without waiting for the answer."""
        for seat in seats:
            if seat.asked is None:
                seat.asked = seat.actor.meter.remote()
            elif ray.wait([seat.asked], timeout=0)[0]:
                try:
                    seat.seen = ray.get(seat.asked).get("audio_seconds", 0.0)
                except RayError:
                    continue  # it died; its units will say so
                seat.asked = None
        self.watcher.tick(sum(seat.counted + seat.seen for seat in seats))


def _get(reference: Any) -> Any:
    """Get a result; an error of ours comes as it is."""
    try:
        return ray.get(reference)
    except RayTaskError as error:
        if isinstance(error.cause, LatentmillError):
            raise error.cause from error
        raise
    except RayActorError as error:
        raise UnitsFailedError(
            f"A worker died while it loaded the model: {_first_line(error)}"
        ) from error


def _first_line(error: BaseException | None) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
