"""Handing units to actors: longest first, a bounded number in flight, lost ones again elsewhere."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import ray
from ray.exceptions import RayError, RayTaskError

from latentmill.engine.actor import UNITS_IN_FLIGHT, ActorShape, start_actor
from latentmill.engine.worker import Job, UnitResult
from latentmill.errors import LatentmillError, UnitsFailedError
from latentmill.plan import Unit

MAX_ATTEMPTS = 3
POLL_SECONDS = 0.5
# `ray job stop` gives a driver three seconds between SIGTERM and SIGKILL.
STOP_SECONDS = 2.0


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
    """One place for an actor. When its actor fails, another one takes the seat."""

    actor: Any
    units: dict[Any, Unit] = field(default_factory=dict)  # by Ray reference
    tainted: bool = False  # its actor failed: takes no more units
    counted: float = 0.0  # audio seconds that its earlier actors encoded
    seen: float = 0.0  # audio seconds of the present actor, as last asked
    asked: Any = None  # reference of the open question


class Scheduler:
    """Runs units to their commits on a fixed number of actors. For one run.

    A unit that is lost with its actor is tried again, `MAX_ATTEMPTS` times in all, on another
    actor and alone: if it is the one that kills actors, no other unit goes down with it.
    """

    def __init__(self, job: Job, shape: ActorShape, workers: int, watcher: Watcher) -> None:
        """Take a job, what Ray reserves for an actor, how many actors, and who is told."""
        self._job = job
        self._shape = shape
        self._workers = workers
        self._watcher = watcher
        self._seats: list[_Seat] = []
        self._waiting: deque[Unit] = deque()
        self._lost: deque[Unit] = deque()
        self._attempts: dict[int, int] = {}  # by unit number, of units that were lost
        self._failed: dict[str, BaseException] = {}  # by unit name, after the last attempt

    def run(
        self,
        units: Sequence[Unit],
        on_origin: Callable[[npt.NDArray[np.float32]], None],
    ) -> None:
        """Run all units. `on_origin` gets the model's latent of silence before any unit starts.

        Raises:
            StorageError: The store cannot be written.
            ModelError: The model cannot be loaded.
            UnitsFailedError: Units failed on every attempt (all others are committed), or a
                worker died while it loaded the model.
        """
        self._waiting.extend(sorted(units, key=lambda unit: (-unit.seconds, unit.number)))
        try:
            for _ in range(min(self._workers, len(units))):
                self._seats.append(_Seat(start_actor(self._job, self._shape)))
            on_origin(self._origin())
            while self._waiting or self._lost or any(seat.units for seat in self._seats):
                for seat in self._seats:
                    self._fill(seat)
                self._wait()
                self._ask()
        finally:
            self._dismiss()
        if self._failed:
            name, error = next(iter(self._failed.items()))
            raise UnitsFailedError(
                f"{len(self._failed)} of {len(units)} units failed on {MAX_ATTEMPTS} attempts each "
                f"(unit {name}: {_first_line(error)}); the others are committed. Run again to try "
                "them again."
            ) from error

    def _origin(self) -> npt.NDArray[np.float32]:
        """The model's latent of silence, when the first actor has its place and its model."""
        reference = self._seats[0].actor.origin.remote()
        while not ray.wait([reference], timeout=POLL_SECONDS)[0]:
            self._watcher.tick(0.0)
        try:
            origin: npt.NDArray[np.float32] = ray.get(reference)
        except RayTaskError as error:
            if isinstance(error.cause, LatentmillError):
                raise error.cause from error
            raise UnitsFailedError(
                f"A worker failed while it loaded the model: {_first_line(error.cause or error)}."
            ) from error
        except RayError as error:
            raise UnitsFailedError(
                f"A worker died while it loaded the model: {_first_line(error)}"
            ) from error
        return origin

    def _fill(self, seat: _Seat) -> None:
        """Give a seat the units that it may have."""
        while unit := self._next(seat):
            seat.units[seat.actor.encode.remote(unit)] = unit

    def _next(self, seat: _Seat) -> Unit | None:
        if seat.tainted or any(unit.number in self._attempts for unit in seat.units.values()):
            return None
        if self._lost and not seat.units:
            return self._lost.popleft()
        if self._waiting and len(seat.units) < UNITS_IN_FLIGHT:
            return self._waiting.popleft()
        return None

    def _wait(self) -> None:
        """Wait a moment for a unit to end, one way or the other."""
        owners = {reference: seat for seat in self._seats for reference in seat.units}
        ready, _ = ray.wait(list(owners), num_returns=1, timeout=POLL_SECONDS)
        for reference in ready:
            seat = owners[reference]
            unit = seat.units.pop(reference)
            try:
                self._watcher.unit_done(ray.get(reference))
            except RayTaskError as error:
                if isinstance(error.cause, LatentmillError):
                    raise error.cause from error
                # A process whose GPU or library has failed once may fail every unit after it.
                seat.tainted = True
                self._lose(unit, error.cause or error)
            except RayError as error:  # the actor died, or cannot be reached any more
                seat.tainted = True
                for lost in (unit, *seat.units.values()):
                    self._lose(lost, error)
                seat.units.clear()
            if seat.tainted and not seat.units:
                self._replace(seat)

    def _lose(self, unit: Unit, error: BaseException) -> None:
        attempt = self._attempts[unit.number] = self._attempts.get(unit.number, 0) + 1
        self._watcher.unit_lost(unit, attempt, _first_line(error))
        if attempt < MAX_ATTEMPTS:
            self._lost.append(unit)
        else:
            self._failed[unit.name] = error

    def _replace(self, seat: _Seat) -> None:
        """Put a new actor into a seat, if there is work left for it."""
        seat.counted, seat.seen, seat.asked = seat.counted + seat.seen, 0.0, None
        if self._waiting or self._lost:
            ray.kill(seat.actor)
            seat.actor = start_actor(self._job, self._shape)
            seat.tainted = False

    def _ask(self) -> None:
        """Ask the actors how far they are, without waiting for the answer."""
        for seat in self._seats:
            if seat.tainted:
                continue
            if seat.asked is None:
                seat.asked = seat.actor.meter.remote()
            elif ray.wait([seat.asked], timeout=0)[0]:
                try:
                    seat.seen = ray.get(seat.asked).get("audio_seconds", 0.0)
                except RayError:
                    continue  # it died; its units will say so
                seat.asked = None
        self._watcher.tick(sum(seat.counted + seat.seen for seat in self._seats))

    def _dismiss(self) -> None:
        """End the actors; those in the middle of a unit may first remove its temporary file."""
        open_units = [reference for seat in self._seats for reference in seat.units]
        if open_units:
            for seat in self._seats:
                seat.actor.stop.remote()
            ray.wait(open_units, num_returns=len(open_units), timeout=STOP_SECONDS)
        for seat in self._seats:
            ray.kill(seat.actor)


def _first_line(error: BaseException) -> str:
    """What went wrong, in one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if isinstance(error, RayError):
        return lines[0] if lines else type(error).__name__
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
