"""Encodes units on actors, which may join and leave during a run.

The scheduler makes the calls to actors and handles their results. `Dispatch` decides which unit
goes where, `classify` why a worker was lost. A worker slot gets units after its actor has been
placed in the cluster and has loaded its model, so that an actor that waits for a node delays
nothing.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import ray
from ray.exceptions import RayError, RayTaskError

from latentmill.engine.actor import ActorShape, start_actor
from latentmill.engine.cluster import head_answers
from latentmill.engine.dispatch import MAX_ATTEMPTS, Dispatch, Loss
from latentmill.engine.joint import JointJob
from latentmill.engine.loss import classify
from latentmill.engine.underway import UnitProgress
from latentmill.engine.worker import Job, UnitResult
from latentmill.engine.worker_slot import WorkerSlot
from latentmill.errors import LatentmillError, SourceError, StorageError, UnitsFailedError
from latentmill.plan import Unit
from latentmill.text.log import get_logger
from latentmill.text.printing import counted

_log = get_logger("engine")

POLL_SECONDS = 0.1
SLOTS_PER_SECOND = 500  # limits the driver's polling: with more slots the interval grows
REPORT_SECONDS = 1.0
REPORTS_PER_SECOND = 20
# `ray job stop` gives a driver three seconds between SIGTERM and SIGKILL.
STOP_SECONDS = 2.0
STALL_SECONDS = 900.0
RESIZE_SECONDS = 5.0  # between two checks of the cluster's resources
NO_WORKER_SECONDS = 60.0  # without a ready worker before a message is shown
PLACE_SECONDS = 300.0  # without a working worker before those without a node are given up
MAX_STARTS = 3  # failed starts in a row before the run ends, or starts actors one by one
RESTART_SECONDS = 60.0  # between two of these starts; twice as long after each that fails
LONGEST_RESTART_SECONDS = 3600.0
STORAGE_RETRY_SECONDS = 600.0  # before a worker that could not read or write gets more units

Kind = Literal["place", "ready", "origin", "unit", "report"]


class RunObserver(Protocol):
    """Receives the events of a run, in the driver's thread."""

    def unit_done(self, result: UnitResult) -> None:
        """Called when a unit was committed."""

    def unit_lost(self, unit: Unit, attempt: int, reason: str) -> None:
        """Called when an attempt at a unit failed. It is retried if attempts are left."""

    def interrupted(self) -> None:
        """Called when the run is interrupted, before the workers are stopped."""

    def workers(self, ready: int, starting: int) -> None:
        """Called when the number of ready or starting workers changed."""

    def tick(self, in_flight: Mapping[int, UnitProgress]) -> None:
        """Called about once a second with the progress of the workers' units, by number."""


@dataclass(frozen=True)
class _Call:
    """A call to an actor that has not returned yet."""

    slot: WorkerSlot
    kind: Kind


class Scheduler:
    """Encodes the units of one run on `wanted()` actors.

    `wanted` is called every few seconds, so that the number of actors follows the cluster. `check`
    is called in every iteration; it raises if another run has taken over the store. An actor that
    makes no progress for `stall_seconds` is replaced.
    """

    def __init__(
        self,
        job: Job | JointJob,
        shape: ActorShape,
        wanted: Callable[[], int],
        observer: RunObserver,
        *,
        check: Callable[[], None] = lambda: None,
        stall_seconds: float = STALL_SECONDS,
    ) -> None:
        self._job = job
        self._shape = shape
        self._wanted = wanted
        self._observer = observer
        self._check = check
        self._stall_seconds = stall_seconds
        self._slots: list[WorkerSlot] = []
        self._to_fill: set[WorkerSlot] = set()  # slots that may be able to get more units
        self._calls: dict[Any, _Call] = {}  # by Ray reference
        self._origin: Any = None
        self._target = 0
        self._next_look = self._next_report = 0.0
        self._counts: tuple[int, int] | None = None
        self._idle_since = self._warned = time.monotonic()  # when an actor was last working
        self._failed_starts = 0
        self._start_error: LatentmillError | None = None  # the last one
        self._next_start = 0.0  # when one more actor may start after failed starts
        self._pause = RESTART_SECONDS

    def run(self, units: Sequence[Unit], on_origin: Callable[[Any], None]) -> None:
        """Encode all units. `on_origin` gets what a worker's `origin` returns before any unit
        starts, also if there are no units.

        Raises UnitsFailedError if units failed on every attempt (all others are committed), or if
        no worker can load the model. Raises StorageError if no worker can write the store, and
        SourceError if none can read the source; a single unit that cannot be written fails alone.
        """
        self._dispatch = Dispatch(units)
        self._on_origin = on_origin
        try:
            while self._dispatch.open or self._origin is None:
                self._check()
                self._start_actors()
                self._assign_units()
                self._collect_results()
                self._monitor()
        except KeyboardInterrupt:
            self._observer.interrupted()
            raise
        finally:
            self._stop_actors()
        if self._dispatch.failed:
            name, loss = next(iter(self._dispatch.failed.items()))
            attempts = "every attempt" if loss.kind == "node" else f"{MAX_ATTEMPTS} attempts each"
            raise UnitsFailedError(
                f"{len(self._dispatch.failed)} of {len(units)} units failed on {attempts} (unit "
                f"{name}: {loss.reason.rstrip('.')}), the others are committed: run the same "
                "command again to retry them."
            )

    def _start_actors(self) -> None:
        """Start actors if more are wanted and enough units are open."""
        now = time.monotonic()
        if now >= self._next_look:
            self._target, self._next_look = self._wanted(), now + RESIZE_SECONDS
        waiting = sum(slot.retry_at is not None for slot in self._slots)
        missing = min(self._target, max(1, self._dispatch.open) + waiting) - len(self._slots)
        if self._failed_starts >= MAX_STARTS and self._slots:  # continue with those that are there
            self._end_if_none_starts()
            loading = any(slot.placed and not slot.ready for slot in self._slots)
            missing = min(missing, 1) if now >= self._next_start and not loading else 0
        for _ in range(missing):
            _log.debug("starting a worker with %s", self._shape)
            slot = WorkerSlot(start_actor(self._job, self._shape))
            self._slots.append(slot)
            self._track(slot, "place", slot.actor.place.remote())
            self._track(slot, "ready", slot.actor.ready.remote())
            self._next_start = now + self._pause
        self._count_workers()

    def _end_if_none_starts(self) -> None:
        ready = any(slot.ready for slot in self._slots)
        if self._start_error is not None and not ready and self._none_left():
            raise self._start_error

    def _none_left(self) -> bool:
        """Whether no worker can encode, none loads its model, and none will be placed soon."""
        starting = [slot for slot in self._slots if not slot.ready]
        if any(slot.working for slot in self._slots) or any(slot.placed for slot in starting):
            return False
        return not starting or time.monotonic() - self._idle_since > PLACE_SECONDS

    def _assign_units(self) -> None:
        """Assign units to the slots whose situation has changed."""
        to_fill, self._to_fill = self._to_fill, set()
        for slot in to_fill:
            if not slot.ready or slot.tainted or self._origin is None:
                continue
            if slot.retry_at and time.monotonic() < slot.retry_at and not self._none_left():
                self._to_fill.add(slot)
                continue
            while assignment := self._dispatch.next(slot, slot.holding):
                reference = slot.actor.encode.remote(assignment.unit, assignment.trial_load)
                slot.assign(reference, assignment)
                self._track(slot, "unit", reference)
                unit = assignment.unit
                _log.debug(
                    "unit %s given to %s: %s, %.0f s of audio",
                    unit.name,
                    slot.place,
                    counted(unit.items, "item"),
                    unit.seconds,
                )
                if assignment.trial_load:
                    _log.warning(
                        "unit %s: loading its items on trial before the last attempt",
                        unit.name,
                    )

    def _track(self, slot: WorkerSlot, kind: Kind, reference: Any) -> None:
        self._calls[reference] = _Call(slot, kind)

    def _collect_results(self) -> None:
        """Wait a moment, then handle the calls that have returned."""
        if not self._calls:  # no actor fits on the cluster
            time.sleep(POLL_SECONDS)
            return
        references = list(self._calls)
        # Wait for all calls, not for the first: the cost of a wait grows with the number of calls.
        timeout = max(POLL_SECONDS, len(self._slots) / SLOTS_PER_SECOND)
        ready, _ = ray.wait(references, num_returns=len(references), timeout=timeout)
        for reference in ready:
            call = self._calls.pop(reference, None)
            if call is None:  # its slot was removed in this loop
                continue
            try:
                reply = ray.get(reference)
            except RayTaskError as error:
                self._failed(call, reference, error)
            except RayError as error:  # the actor died or cannot be reached
                self._lose_slot(call.slot, classify(error, call.slot.memory_used))
            else:
                for logger, level, text in reply.messages:
                    logging.getLogger(logger).log(level, "%s", text)
                self._succeeded(call, reference, reply.value)

    def _succeeded(self, call: _Call, reference: Any, result: Any) -> None:
        slot = call.slot
        if call.kind == "unit":
            unit = slot.finished(reference).unit
            slot.retry_at = None
            self._dispatch.done(unit)
            _log.debug(
                "unit %s committed by %s in %.1f s: %d encoded, %d skipped, %d failed",
                unit.name,
                slot.place,
                result.timings.get("total_seconds", 0.0),
                result.encoded,
                result.skipped,
                result.failed,
            )
            self._observer.unit_done(result)
            self._to_fill.add(slot)
            if slot.tainted and not slot.units:
                self._end_slot(slot)
        elif call.kind == "report":
            slot.update(result)
        elif call.kind == "place":
            slot.placed, slot.place = True, result
        elif call.kind == "ready":
            slot.ready, slot.placed, slot.place = True, True, result
            self._to_fill.add(slot)
            self._failed_starts, self._pause = 0, RESTART_SECONDS
            if self._origin is None:
                self._track(slot, "origin", slot.actor.origin.remote())
        elif self._origin is None:
            self._origin = result
            self._on_origin(result)
            self._to_fill.update(self._slots)

    def _failed(self, call: _Call, reference: Any, error: RayTaskError) -> None:
        """Handle a call that ended with an exception; its process is alive."""
        slot, cause, loss = call.slot, error.cause, classify(error)
        if call.kind in ("place", "ready", "origin"):
            refused = isinstance(cause, LatentmillError)
            self._lose_slot(slot, loss, cause if refused else _not_loaded("failed", loss, error))
            return
        if isinstance(cause, LatentmillError):
            if call.kind == "unit" and isinstance(cause, StorageError | SourceError):
                self._unstored(slot, slot.finished(reference).unit, cause)
                return
            raise cause from error
        if call.kind == "report":
            self._lose_slot(slot, loss)
            return
        # If the GPU or a library has failed once in a process, later units may fail there too.
        slot.tainted = True
        self._lose(slot.finished(reference).unit, loss)
        if not slot.units:
            self._end_slot(slot)

    def _unstored(self, slot: WorkerSlot, unit: Unit, error: LatentmillError) -> None:
        """Queue a unit again that its worker could not read or write, and pause this worker.

        The others continue: perhaps only its host lacks a mount or is full. If it has failed
        before, this was not due to the unit. If no worker is left, the run ends.
        """
        error = slot.located(error)
        known = slot.retry_at is not None and not self._none_left()
        slot.retry_at = time.monotonic() + STORAGE_RETRY_SECONDS
        self._dispatch.leave(slot)  # no suspect waits for it
        self._lose(unit, Loss("node" if known else "storage", str(error)))
        if self._dispatch.storage_fails and (self._none_left() or not self._dispatch.open):
            raise error
        if slot.tainted and not slot.units:
            self._end_slot(slot)

    def _lose_slot(
        self, slot: WorkerSlot, loss: Loss, start_error: LatentmillError | None = None
    ) -> None:
        """Remove the slot of a lost actor, or one that cannot start; queue its units again."""
        lost = slot.holding
        slot.units.clear()
        for unit in lost:
            self._lose(unit, loss)
        self._end_slot(slot)
        if start_error is not None:
            self._failed_start(slot, start_error, count=MAX_STARTS)
        elif not slot.ready and loss.kind == "worker":
            self._failed_start(slot, _not_loaded("died", loss, None), count=1)
        elif not lost:
            _log.warning("%s was lost: %s", slot.place, loss.reason)

    def _lose(self, unit: Unit, loss: Loss) -> None:
        self._observer.unit_lost(unit, self._dispatch.lost(unit, loss), loss.reason)
        self._to_fill.update(self._slots)

    def _failed_start(self, slot: WorkerSlot, error: LatentmillError, count: int) -> None:
        """Count a start that failed; the slot was removed. If no other is left, the run ends."""
        self._failed_starts += count
        self._next_start = time.monotonic() + self._pause
        self._pause = min(2 * self._pause, LONGEST_RESTART_SECONDS)
        repeated = str(error) in str(self._start_error)
        self._start_error = slot.located(error)
        if self._failed_starts >= MAX_STARTS:
            self._end_if_none_starts()
        if not repeated:
            _log.warning("%s", self._start_error)

    def _end_slot(self, slot: WorkerSlot) -> None:
        """Remove an actor. `_start_actors` starts another one if units are left."""
        assert not slot.units
        self._slots.remove(slot)
        self._to_fill.discard(slot)
        self._dispatch.leave(slot)
        self._calls = {ref: call for ref, call in self._calls.items() if call.slot is not slot}
        ray.kill(slot.actor)

    def _monitor(self) -> None:
        """Request progress reports, and replace actors that make no progress."""
        now = time.monotonic()
        if now < self._next_report:
            return
        self._next_report = now + max(REPORT_SECONDS, len(self._slots) / REPORTS_PER_SECOND)
        for slot in list(self._slots):
            if slot.ready and not slot.reporting:
                slot.reporting = True
                self._track(slot, "report", slot.actor.report.remote())
            if slot.stalled(self._stall_seconds):
                minutes = self._stall_seconds / 60
                self._lose_slot(slot, Loss("worker", f"no progress for {minutes:g} minutes"))
        self._count_workers()
        progress = [slot.progress for slot in self._slots]
        self._observer.tick({number: one for units in progress for number, one in units.items()})

    def _count_workers(self) -> None:
        ready = sum(slot.ready for slot in self._slots)
        counts = ready, len(self._slots) - ready
        if counts != self._counts:
            self._counts = counts
            self._observer.workers(*counts)
        now = time.monotonic()
        if any(slot.working for slot in self._slots):
            self._idle_since = now
        if ready:
            self._warned = now
        elif now - self._warned > NO_WORKER_SECONDS:
            self._warned = now
            _log.warning(
                "no worker is ready: %d are waiting for %s in the cluster, or loading the model",
                counts[1],
                self._shape,
            )

    def _stop_actors(self) -> None:
        """End the actors; those that are encoding a unit first remove its temporary file."""
        if not head_answers():
            return  # the actors ended with the head
        open_units = [reference for slot in self._slots for reference in slot.units]
        if open_units:
            for slot in self._slots:
                if slot.units:
                    slot.actor.stop.remote()
            ray.wait(open_units, num_returns=len(open_units), timeout=STOP_SECONDS)
        for slot in self._slots:
            ray.kill(slot.actor)


def _not_loaded(how: str, loss: Loss, cause: BaseException | None) -> UnitsFailedError:
    reason = loss.reason.rstrip(".")
    error = UnitsFailedError(f"A worker {how} while it loaded the model: {reason}.")
    error.__cause__ = cause
    return error
