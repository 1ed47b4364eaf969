"""Loads a unit's audio in Ray tasks, on any nodes that have free CPU cores.

Each task loads some of the unit's lanes (see `encoding/lanes.py`), one chunk of each in turn, and
sends them in parcels (`parcels.py`) through Ray's object store. It pauses when `PARCELS_UNREAD`
parcels have not been received yet.
"""

from __future__ import annotations

import contextlib
import queue
import socket
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
from latentmill.engine.node_trouble import (
    AvoidedNodes,
    NodeTrouble,
    label_selector,
    other_nodes,
)
from latentmill.engine.parcels import Parcel, parcels_with_progress, unpacked
from latentmill.engine.trial_load import HANG_SECONDS, TrialStartError
from latentmill.errors import LatentmillError, LoadTaskError, StorageError
from latentmill.record import Outcome
from latentmill.sources.base import Item
from latentmill.storage.remote import cause_of, own_limits
from latentmill.text.log import get_logger

_log = get_logger("engine")

PARCELS_UNREAD = 4  # for each task
EVENTS_WAITING = 16  # received events that wait for the model
START_SECONDS = 5.0  # tasks that have no core by then are given up
REPLACE_SECONDS = 30.0  # the same for a task that continues the lanes of another one
WAIT_SECONDS = 1.0  # between two checks whether the unit was closed
NO_CORE_SECONDS = 60.0  # between two warnings that no task has a core

# With these errors the task is lost, perhaps because of an item. Others end the unit.
_LOSSES = (WorkerCrashedError, OutOfMemoryError, NodeDiedError, ObjectLostError)


@ray.remote(num_cpus=1, max_retries=0, scheduling_strategy="SPREAD")
def _load(
    lanes: Sequence[Sequence[Numbered]], loading: Loading, trial: float | None
) -> Iterator[Parcel]:
    try:
        with own_limits():
            yield from parcels_with_progress(lanes, loading, trial)
    except (StorageError, OSError, TrialStartError) as error:
        node = ray.get_runtime_context().get_node_id()
        yield Parcel(trouble=NodeTrouble(node, socket.gethostname(), _reason(error)))


def _reason(error: Exception) -> str:
    if isinstance(error, StorageError):
        return str(error).rstrip(".")
    return f"{cause_of(error)}; fix this, or remove the node from the cluster"


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
    losses: Counter[str] = field(default_factory=Counter)  # of the tasks before this one, by kind
    sent: Counter[int] = field(default_factory=Counter)
    started: bool = False  # it has sent a parcel
    began: float = field(default_factory=time.monotonic)


class RemoteAudio:
    """A `UnitAudio` whose items are loaded by up to `tasks` Ray tasks, all at once.

    The tasks start when iteration starts, because a task keeps its core while it waits for its
    parcels to be received: only the unit whose turn it is may use cores. If fewer tasks than
    requested get a core, the lanes are divided among those. If a task dies, another one continues
    its lanes and first loads each of their items on trial, which finds an item that ends its task.
    A trial load without progress for `hang_seconds` is hung. If the node of a task has trouble, a
    task on another node continues its lanes; no task runs on the nodes in `avoided`.
    """

    def __init__(
        self,
        items: Sequence[Item],
        loading: Loading,
        timings: Timings,
        *,
        tasks: int,
        hang_seconds: float = HANG_SECONDS,
        avoided: AvoidedNodes | None = None,
    ) -> None:
        self._items = items
        self._loading = loading
        self._timings = timings
        self._hang_seconds = hang_seconds
        self._lanes = [
            _RemoteLane(deque(lane)) for lane in lanes_of(items, loading.settings.packing)
        ]
        self._most = tasks
        self._avoided_by_all = avoided or AvoidedNodes()
        self._avoided: dict[str, str] = {}  # hosts of nodes by Ray's id
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
            self._start(self._most)
            for received in in_turn([self._received(lane) for lane in self._lanes]):
                self._put(received)
        except Exception as error:  # noqa: BLE001  the thread that iterates raises it
            cause = getattr(error, "cause", None)
            last = cause if isinstance(cause, LatentmillError) else error
        self._put(last)

    def _start(self, count: int) -> None:
        """Start tasks for all lanes, in place of those that run.

        If some get no core, start fewer: all lanes must be loaded at once.
        """
        losses: Counter[str] = Counter()
        for task in self._tasks:
            losses |= task.losses
        lanes = [lane for lane in self._lanes if lane.items]
        count = min(count, len(lanes))
        while count and not self._stop.is_set():
            self._cancel()
            self._avoided = self._avoided_by_all.current()
            self._tasks = [self._task(lanes[n::count], losses) for n in range(count)]
            started = self._started()
            if started == count or self._stop.is_set():
                return
            if not started:
                continue
            _log.warning(
                "only %d of %d load tasks got a CPU core: lower --load-tasks or add cores",
                started,
                count,
            )
            count = started

    def _started(self) -> int:
        """Wait until a task has a core; how many have one after `START_SECONDS`.

        0 if none has one, and nodes are avoided that may be better now.
        """
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
                if self._avoided and self._avoided != self._avoided_by_all.current():
                    break
        for task in self._tasks:
            task.started = task.parcels in started
        return len(started)

    def _without_core(self, began: float) -> None:
        """Count waiting for a core as progress, because another worker would wait, too."""
        self._timings.step()
        now = time.monotonic()
        if now - max(began, self._warned) > NO_CORE_SECONDS:
            self._warned = now
            hosts = ", ".join(sorted(self._avoided.values()))
            _log.warning(
                "no load task has had a CPU core for %.0f s%s: add CPU cores, lower --workers or "
                "--threads, or stop the run and resume it without --load-tasks",
                now - began,
                f" (avoided: {hosts})" if hosts else "",
            )

    def _task(self, lanes: list[_RemoteLane], losses: Counter[str]) -> _Task:
        options: dict[str, Any] = {"_generator_backpressure_num_objects": PARCELS_UNREAD}
        if self._avoided:
            options["label_selector"] = label_selector(self._avoided)
        items = [list(lane.items) for lane in lanes]
        trial = self._hang_seconds if losses["worker"] else None
        return _Task(lanes, _load.options(**options).remote(items, self._loading, trial), losses)

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
            if not task.started:
                self._not_started(task)
            return
        try:
            parcel = ray.get(next(task.parcels))
        except _LOSSES as error:
            self._lost(task, classify(error))
        else:
            task.started = True
            self._deliver(task, parcel)
            if parcel.trouble is not None:
                self._move(task, parcel.trouble)

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
        self._replace(task, losses)

    def _move(self, task: _Task, trouble: NodeTrouble) -> None:
        """Continue the lanes of a task on another node. Raises LoadTaskError if there is none."""
        known = trouble.node in self._avoided
        self._avoided[trouble.node] = trouble.host
        self._avoided_by_all.add(trouble)
        if not other_nodes(self._avoided):
            raise LoadTaskError(
                f"Load tasks cannot work on {trouble.host}, and no other node has CPU cores for "
                f"them: {trouble.reason}."
            )
        if not known:
            _log.warning(
                "load tasks cannot work on %s, so other nodes continue: %s",
                trouble.host,
                trouble.reason,
            )
        self._replace(task, task.losses)

    def _replace(self, task: _Task, losses: Counter[str]) -> None:
        self._tasks[self._tasks.index(task)] = self._task(task.lanes, losses)

    def _not_started(self, task: _Task) -> None:
        """Called about once a second while a task that replaces another one has not started."""
        self._timings.step()
        if time.monotonic() - task.began > REPLACE_SECONDS:
            # The other tasks keep their cores until this one has loaded its lanes.
            self._start(max(1, len(self._tasks) - 1))

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
