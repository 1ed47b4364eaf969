"""Runs units on actors that come and go: what each is asked, and what is done with its answer.

`Dispatch` decides which unit goes where, `classify` why a worker was lost. A worker slot is given
units once its actor has its place in the cluster and its model in memory, so that an actor that
waits for a node delays nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import ray
from ray.exceptions import RayError, RayTaskError

from latentmill.engine.actor import ActorShape, start_actor
from latentmill.engine.cluster import head_answers
from latentmill.engine.dispatch import MAX_ATTEMPTS, Dispatch, Loss
from latentmill.engine.loss import classify
from latentmill.engine.underway import UnitProgress
from latentmill.engine.worker import Job, UnitResult
from latentmill.engine.worker_slot import WorkerSlot
from latentmill.errors import LatentmillError, StorageError, UnitsFailedError
from latentmill.plan import Unit
from latentmill.record import FloatArray

POLL_SECONDS = 0.1
SEATS_A_SECOND = 500  # with more of them the driver looks less often, and has them wait longer
REPORT_SECONDS = 1.0
QUESTIONS_A_SECOND = 20
# `ray job stop` gives a driver three seconds between SIGTERM and SIGKILL.
STOP_SECONDS = 2.0
STALL_SECONDS = 900.0
GROW_SECONDS = 5.0  # between two looks at what the cluster has
PATIENCE_SECONDS = 60.0  # without any worker, until it is said what is waited for
MAX_STARTS = 3  # failing ones in a row, until the run ends or pauses starting

Kind = Literal["ready", "origin", "unit", "report"]


class RunObserver(Protocol):
    """Who is told how the run goes; called from the driver's thread."""

    def unit_done(self, result: UnitResult) -> None:
        """A unit was committed."""

    def unit_lost(self, unit: Unit, attempt: int, reason: str) -> None:
        """A unit was lost with its actor; it is tried again if attempts are left."""

    def note(self, text: str) -> None:
        """A message for people."""

    def interrupted(self) -> None:
        """The run was interrupted, and the workers are told to stop."""

    def workers(self, ready: int, starting: int) -> None:
        """Number of ready and starting workers changed."""

    def tick(self, in_flight: Mapping[int, UnitProgress]) -> None:
        """How far the workers' units are, by number; about once a second."""


@dataclass(frozen=True)
class _Call:
    """A question to an actor that is not answered yet."""

    slot: WorkerSlot
    kind: Kind


class Scheduler:
    """Runs units to their commits on the actors that there is room for. For one run.

    Args:
        job: What the workers need to know.
        shape: What Ray reserves for an actor.
        wanted: How many actors there should be, as the cluster is now.
        watcher: Who is told.
        check: Called again and again; raises when the store is not this run's any more.
        stall_seconds: After so long without progress an actor is replaced.
    """

    def __init__(
        self,
        job: Job,
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
        self._hungry: set[WorkerSlot] = set()  # may have more units, perhaps
        self._calls: dict[Any, _Call] = {}  # by Ray reference
        self._origin: FloatArray | None = None
        self._target = 0
        self._next_look = self._next_report = 0.0
        self._told: tuple[int, int] | None = None
        self._idle_since = time.monotonic()  # since when no actor is ready
        self._failed_starts = 0

    def run(self, units: Sequence[Unit], on_origin: Callable[[FloatArray], None]) -> None:
        """Run all units. `on_origin` gets the model's latent of silence before any unit starts.

        Raises:
            StorageError: The store cannot be written (one unit that cannot be fails alone).
            StoreError: The store is another run's now.
            ModelError: The model cannot be loaded.
            UnitsFailedError: Units failed on every attempt (all others are committed), or the
                workers die while they load the model.
        """
        self._dispatch = Dispatch(units)
        self._on_origin = on_origin
        try:
            while self._dispatch.open:
                self._check()
                self._grow()
                self._fill()
                self._wait()
                self._look_after()
        except KeyboardInterrupt:
            self._observer.interrupted()
            raise
        finally:
            self._dismiss()
        if self._dispatch.failed:
            name, loss = next(iter(self._dispatch.failed.items()))
            attempts = "every attempt" if loss.kind == "node" else f"{MAX_ATTEMPTS} attempts each"
            raise UnitsFailedError(
                f"{len(self._dispatch.failed)} of {len(units)} units failed on {attempts} (unit "
                f"{name}: {loss.reason.rstrip('.')}); the others are committed. Run again to try "
                "them again."
            )

    def _grow(self) -> None:
        """Start actors where there is room for more of them, and work."""
        now = time.monotonic()
        if now >= self._next_look:
            self._target, self._next_look = self._wanted(), now + GROW_SECONDS
        if self._failed_starts >= MAX_STARTS and self._slots:
            return  # those that are there go on
        while len(self._slots) < min(self._target, self._dispatch.open):
            slot = WorkerSlot(start_actor(self._job, self._shape))
            self._slots.append(slot)
            self._ask(slot, "ready", slot.actor.ready.remote())
        self._tell()

    def _fill(self) -> None:
        """Give the slots the units that they may have: those for which something has changed."""
        hungry, self._hungry = self._hungry, set()
        for slot in hungry:
            if not slot.ready or slot.tainted or self._origin is None:
                continue
            while assignment := self._dispatch.next(slot, slot.holding):
                reference = slot.actor.encode.remote(assignment.unit, assignment.trial_load)
                slot.give(reference, assignment)
                self._ask(slot, "unit", reference)
                if assignment.trial_load:
                    name = assignment.unit.name
                    self._observer.note(
                        f"unit {name}: its items are decoded on trial for its last attempt"
                    )

    def _ask(self, slot: WorkerSlot, kind: Kind, reference: Any) -> None:
        self._calls[reference] = _Call(slot, kind)

    def _wait(self) -> None:
        """Wait a moment, and take the answers that are there."""
        if not self._calls:  # no room for any actor
            time.sleep(POLL_SECONDS)
            return
        references = list(self._calls)
        # Not until the first one: each wait costs as much as there are calls.
        patience = max(POLL_SECONDS, len(self._slots) / SEATS_A_SECOND)
        ready, _ = ray.wait(references, num_returns=len(references), timeout=patience)
        for reference in ready:
            call = self._calls.pop(reference, None)
            if call is None:  # its slot was lost a moment ago
                continue
            try:
                answer = ray.get(reference)
            except RayTaskError as error:
                self._failed(call, reference, error)
            except RayError as error:  # the actor died, or cannot be reached any more
                self._lose_seat(call.slot, classify(error, call.slot.memory_used))
            else:
                self._answered(call, reference, answer)

    def _answered(self, call: _Call, reference: Any, answer: Any) -> None:
        slot = call.slot
        if call.kind == "unit":
            self._dispatch.done(slot.finished(reference).unit)
            self._observer.unit_done(answer)
            self._hungry.add(slot)
            if slot.tainted and not slot.units:
                self._end_seat(slot)
        elif call.kind == "report":
            slot.heard(answer)
        elif call.kind == "ready":
            slot.ready, slot.place = True, answer
            self._hungry.add(slot)
            self._failed_starts = 0
            if self._origin is None:
                self._ask(slot, "origin", slot.actor.origin.remote())
        elif self._origin is None:
            self._origin = answer
            self._on_origin(answer)
            self._hungry.update(self._slots)

    def _failed(self, call: _Call, reference: Any, error: RayTaskError) -> None:
        """A call ended with an exception; its process lives."""
        slot = call.slot
        if isinstance(error.cause, LatentmillError):
            if call.kind == "ready" and self._origin is not None:  # a latecomer's own trouble
                self._observer.note(f"a worker cannot start: {error.cause}")
                self._end_seat(slot)
                self._failed_starts = MAX_STARTS
                if not self._slots:
                    raise error.cause from error
                return
            if call.kind == "unit" and isinstance(error.cause, StorageError):
                self._unwritten(slot, slot.finished(reference).unit, error.cause)
                return
            raise error.cause from error
        loss = classify(error)
        if call.kind == "report":
            self._lose_seat(slot, loss)
            return
        if call.kind != "unit":
            self._end_seat(slot)
            self._failed_start("failed", loss, error)
            return
        # A process whose GPU or library has failed once may fail every unit after it.
        slot.tainted = True
        self._lose(slot.finished(reference).unit, loss)
        if not slot.units:
            self._end_seat(slot)

    def _unwritten(self, slot: WorkerSlot, unit: Unit, error: StorageError) -> None:
        """A unit could not be written; the others may be, unless it is the storage's fault."""
        self._lose(unit, Loss("storage", str(error)))
        if self._dispatch.unwritable:
            raise error
        if slot.tainted and not slot.units:
            self._end_seat(slot)

    def _lose_seat(self, slot: WorkerSlot, loss: Loss) -> None:
        """An actor is gone, with all that it had."""
        lost = slot.holding
        slot.units.clear()
        for unit in lost:
            self._lose(unit, loss)
        self._end_seat(slot)
        if not slot.ready and loss.kind == "worker":
            self._failed_start("died", loss, None)
        elif not lost:
            self._observer.note(f"{slot.place} was lost: {loss.reason}")

    def _lose(self, unit: Unit, loss: Loss) -> None:
        self._observer.unit_lost(unit, self._dispatch.lost(unit, loss), loss.reason)
        self._hungry.update(self._slots)

    def _failed_start(self, how: str, loss: Loss, error: BaseException | None) -> None:
        self._failed_starts += 1
        text = f"A worker {how} while it loaded the model: {loss.reason.rstrip('.')}."
        enough = self._failed_starts >= MAX_STARTS
        if (self._origin is None and (how == "failed" or enough)) or (enough and not self._slots):
            raise UnitsFailedError(text) from error
        self._observer.note(text)

    def _end_seat(self, slot: WorkerSlot) -> None:
        """Take an actor out; `_grow` puts another one into its place if there is work left."""
        assert not slot.units
        self._slots.remove(slot)
        self._hungry.discard(slot)
        self._dispatch.leave(slot)
        self._calls = {ref: call for ref, call in self._calls.items() if call.slot is not slot}
        ray.kill(slot.actor)

    def _look_after(self) -> None:
        """Ask the actors how far they are; replace those that do not move any more."""
        now = time.monotonic()
        if now < self._next_report:
            return
        self._next_report = now + max(REPORT_SECONDS, len(self._slots) / QUESTIONS_A_SECOND)
        for slot in list(self._slots):
            if slot.ready and not slot.asking:
                slot.asking = True
                self._ask(slot, "report", slot.actor.report.remote())
            if slot.stalled(self._stall_seconds):
                minutes = self._stall_seconds / 60
                self._lose_seat(slot, Loss("worker", f"no progress for {minutes:g} minutes"))
        self._tell()
        progress = [slot.progress for slot in self._slots]
        self._observer.tick({number: one for units in progress for number, one in units.items()})

    def _tell(self) -> None:
        ready = sum(slot.ready for slot in self._slots)
        counts = ready, len(self._slots) - ready
        if counts != self._told:
            self._told = counts
            self._observer.workers(*counts)
        now = time.monotonic()
        if ready:
            self._idle_since = now
        elif now - self._idle_since > PATIENCE_SECONDS:
            self._idle_since = now
            self._observer.note(
                f"no worker is ready: {counts[1]} wait for {self._shape} of the cluster, or load "
                "the model"
            )

    def _dismiss(self) -> None:
        """End the actors; those in the middle of a unit may first remove its temporary file."""
        if not head_answers():
            return  # they are gone with it
        open_units = [reference for slot in self._slots for reference in slot.units]
        if open_units:
            for slot in self._slots:
                if slot.units:
                    slot.actor.stop.remote()
            ray.wait(open_units, num_returns=len(open_units), timeout=STOP_SECONDS)
        for slot in self._slots:
            ray.kill(slot.actor)
