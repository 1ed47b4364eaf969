"""Loads a unit's audio in Ray tasks, on any nodes that have free CPU cores.

Each task loads some of the unit's lanes (see `encoding/lanes.py`), one chunk of each in turn, and
sends them in parcels (`parcels.py`) through Ray's object store. It pauses when `PARCELS_UNREAD`
parcels have not been received yet.
"""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import (
    NodeDiedError,
    ObjectLostError,
    OutOfMemoryError,
    RayError,
    WorkerCrashedError,
)

from latentmill.encoding.lanes import Numbered, in_turn, lanes_of
from latentmill.encoding.loading import Event, Facts, ItemEvent, Loading
from latentmill.encoding.timings import Timings
from latentmill.engine.dispatch import MAX_ATTEMPTS, MAX_NODE_LOSSES, Loss
from latentmill.engine.loss import classify
from latentmill.engine.parcels import Parcel, parcels_with_progress, unpacked
from latentmill.engine.trial_load import HANG_SECONDS
from latentmill.errors import LatentmillError
from latentmill.record import Outcome
from latentmill.sources.base import Item
from latentmill.text.log import get_logger

_log = get_logger("engine")

PARCELS_UNREAD = 4  # for each task
EVENTS_WAITING = 16  # received events that wait for the model
START_SECONDS = 5.0  # tasks that have no core by then are given up
WAIT_SECONDS = 1.0  # between two checks whether the unit was closed
NO_CORE_SECONDS = 60.0  # between two warnings that no task has a core

# With these errors the task is lost, perhaps because of an item. Others end the unit.
_LOSSES = (WorkerCrashedError, OutOfMemoryError, NodeDiedError, ObjectLostError)


@ray.remote(num_cpus=1, max_retries=0, scheduling_strategy="SPREAD")
def _load(
    lanes: Sequence[Sequence[Numbered]], loading: Loading, trial: float | None
) -> Iterator[Parcel]:
    yield from parcels_with_progress(lanes, loading, trial)


@dataclass(eq=False)
class _RemoteLane:
    """The items of a lane that are not finished, and events that were received from its task."""

    items: deque[Numbered]
    received: deque[tuple[int, Event]] = field(default_factory=deque)


@dataclass(eq=False)
class _Task:
    """A running task, its lanes, and the number of events that it sent per item."""

    lanes: list[_RemoteLane]
    parcels: Any  # Ray's generator of object references
    sent: Counter[int] = field(default_factory=Counter)
    losses: Counter[str] = field(default_factory=Counter)  # of this task and those before, by kind


class RemoteAudio:
    """A `UnitAudio` whose items are loaded by up to `tasks` Ray tasks, all at once.

    The tasks start when iteration starts, because a task keeps its core while it waits for its
    parcels to be received: only the unit whose turn it is may use cores. If fewer tasks than
    requested get a core, the lanes are divided among those. If a task dies, another one continues
    its lanes and first loads each of their items on trial, which finds an item that ends its task.
    A trial load without progress for `hang_seconds` is hung.
    """

    def __init__(
        self,
        items: Sequence[Item],
        loading: Loading,
        timings: Timings,
        *,
        tasks: int,
        hang_seconds: float = HANG_SECONDS,
    ) -> None:
        self._items = items
        self._loading = loading
        self._timings = timings
        self._hang_seconds = hang_seconds
        self._lanes = [
            _RemoteLane(deque(lane)) for lane in lanes_of(items, loading.settings.packing)
        ]
        self._most = min(tasks, len(self._lanes))
        self._tasks: list[_Task] = []
        self._delivered: Counter[int] = Counter()  # number of events by item
        self._warned = float("-inf")  # when the last warning was that no task has a core
        self._stop = threading.Event()
        self._queue: queue.Queue[tuple[int, Event] | BaseException | None] = queue.Queue(
            EVENTS_WAITING
        )
        self._thread = threading.Thread(target=self._pull, name="load-tasks", daemon=True)

    def __iter__(self) -> Iterator[ItemEvent]:
        self._thread.start()
        while True:
            start = time.perf_counter()
            received = self._queue.get()
            self._timings.add("wait_seconds", time.perf_counter() - start)
            if received is None:
                return
            if isinstance(received, BaseException):
                raise received
            number, event = received
            yield number, self._items[number], unpacked(event)

    @property
    def queued(self) -> int:
        return self._queue.qsize() + sum(len(lane.received) for lane in self._lanes)

    def close(self) -> None:
        self._stop.set()
        if self._thread.ident is not None:
            self._thread.join()
        self._cancel()

    def _pull(self) -> None:
        """Queue the events of all lanes in turn. Runs in its own thread."""
        last: BaseException | None = None
        try:
            self._start()
            for received in in_turn([self._received(lane) for lane in self._lanes]):
                self._put(received)
        except Exception as error:  # noqa: BLE001  the thread that iterates raises it
            cause = getattr(error, "cause", None)
            last = cause if isinstance(cause, LatentmillError) else error
        self._put(last)

    def _start(self) -> None:
        """Start the tasks. If some get no core, start fewer: all lanes must be loaded at once."""
        count = self._most
        while count and not self._stop.is_set():
            self._tasks = [self._task(self._lanes[n::count]) for n in range(count)]
            started = self._started()
            if started == count or self._stop.is_set():
                return
            _log.warning(
                "only %d of %d load tasks got a CPU core: lower --load-tasks or add cores",
                started,
                count,
            )
            self._cancel()
            count = started

    def _started(self) -> int:
        """Wait for at least one task to get a core; how many have one after `START_SECONDS`."""
        waiting = [task.parcels for task in self._tasks]
        began = time.monotonic()
        started: list[Any] = []
        while len(started) < len(waiting) and not self._stop.is_set():
            if started and time.monotonic() - began > START_SECONDS:
                break
            started, _ = ray.wait(
                waiting, num_returns=len(waiting), timeout=WAIT_SECONDS, fetch_local=False
            )
            if not started:
                self._without_core(began)
        return len(started)

    def _without_core(self, began: float) -> None:
        """Count waiting for a core as progress, because another worker would wait, too."""
        self._timings.step()
        now = time.monotonic()
        if now - max(began, self._warned) > NO_CORE_SECONDS:
            self._warned = now
            _log.warning(
                "no load task has had a CPU core for %.0f s: add CPU cores, lower --workers or "
                "--threads, or stop the run and resume it without --load-tasks",
                now - began,
            )

    def _task(self, lanes: list[_RemoteLane], *, trial: bool = False) -> _Task:
        options = {"_generator_backpressure_num_objects": PARCELS_UNREAD}
        items = [list(lane.items) for lane in lanes]
        hang_seconds = self._hang_seconds if trial else None
        return _Task(lanes, _load.options(**options).remote(items, self._loading, hang_seconds))

    def _received(self, lane: _RemoteLane) -> Iterator[tuple[int, Event]]:
        while lane.items or lane.received:
            while not lane.received:
                if self._stop.is_set():
                    return
                self._receive(next(task for task in self._tasks if lane in task.lanes))
            yield lane.received.popleft()

    def _receive(self, task: _Task) -> None:
        ready, _ = ray.wait([task.parcels], timeout=WAIT_SECONDS, fetch_local=False)
        if not ready:
            return
        try:
            parcel = ray.get(next(task.parcels))
        except _LOSSES as error:
            self._lost(task, classify(error))
        else:
            self._deliver(task, parcel)

    def _deliver(self, task: _Task, parcel: Parcel) -> None:
        """Pass on a parcel's events, without those that an earlier task of the item delivered."""
        lanes = {lane.items[0][0]: lane for lane in task.lanes if lane.items}  # by first item
        for number, event in parcel.events:
            lane = lanes[number]
            task.sent[number] += 1
            new = task.sent[number] > self._delivered[number]
            end = isinstance(event, Facts | Outcome)
            if not new and end and isinstance(event, Facts):
                reason = "the file became shorter between two attempts to load it"
                event = Outcome(self._items[number].key, "failed", reason)  # noqa: PLW2901
            if new or end:
                lane.received.append((number, event))
            self._delivered[number] += new
            if end:
                lane.items.popleft()
                if lane.items:
                    lanes[lane.items[0][0]] = lane
        self._timings.add("read_seconds", parcel.read_seconds)
        self._timings.add("decode_seconds", parcel.decode_seconds)

    def _lost(self, task: _Task, loss: Loss) -> None:
        """Continue the lanes of a lost task in another one, which loads their items on trial."""
        losses = task.losses + Counter([loss.kind])
        if losses[loss.kind] >= (MAX_ATTEMPTS if loss.kind == "worker" else MAX_NODE_LOSSES):
            raise RuntimeError(f"a load task was lost {losses[loss.kind]} times: {loss.reason}")
        again = self._task(task.lanes, trial=losses["worker"] > 0)
        again.losses = losses
        self._tasks[self._tasks.index(task)] = again

    def _put(self, received: tuple[int, Event] | BaseException | None) -> None:
        while not self._stop.is_set():
            try:
                self._queue.put(received, timeout=0.2)
            except queue.Full:
                continue
            break

    def _cancel(self) -> None:
        for task in self._tasks:
            with contextlib.suppress(RayError):
                ray.cancel(task.parcels)
        self._tasks = []
