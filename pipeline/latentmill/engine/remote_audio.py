"""Loads a unit's audio in Ray tasks, on any nodes that have free CPU cores.

A task loads several neighbouring items and sends their chunks in parcels through Ray's object
store. It pauses when `PARCELS_AHEAD` parcels have not been received yet. Samples are sent as 16
bits if that is exact.
"""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any, TypeAlias

import numpy as np
import ray
from ray.exceptions import (
    NodeDiedError,
    ObjectLostError,
    OutOfMemoryError,
    RayError,
    WorkerCrashedError,
)

from latentmill.encoding.chunks import Chunk
from latentmill.encoding.timings import Meter
from latentmill.encoding.unit_audio import Event, Facts, ItemEvent, ItemTimer, Loading, Opened, put
from latentmill.engine.dispatch import MAX_ATTEMPTS, MAX_NODE_LOSSES, Loss
from latentmill.engine.loss import classify
from latentmill.errors import LatentmillError
from latentmill.record import Outcome
from latentmill.sources.base import Item, TableCell
from latentmill.sources.reading import UnitReader

PARCEL_BYTES = 2 << 20
PARCELS_AHEAD = 4  # for each task, and the same number in the unit's queue
TASK_SECONDS = 60.0  # of audio per task: short items share a task
TASK_ITEMS = 64
BYTES_PER_SECOND = 32_000  # estimate for audio of unknown length

WAIT_SECONDS = 1.0  # between two checks whether the unit was closed

# With these errors the task is lost, perhaps because of its item. Others end the unit.
_LOSSES = (WorkerCrashedError, OutOfMemoryError, NodeDiedError, ObjectLostError)

Numbered: TypeAlias = tuple[int, Item]  # an item and its number in the unit


@dataclass(frozen=True)
class Parcel:
    """Events of one message, each with its item's number, and the seconds that the task spent."""

    events: tuple[tuple[int, Event], ...]
    read_seconds: float = 0.0
    decode_seconds: float = 0.0


def parcels(numbered: Sequence[Numbered], loading: Loading) -> Iterator[Parcel]:
    """Load items one after the other. Only the measured seconds differ between two calls."""
    events: list[tuple[int, Event]] = []
    size, read, decoded = 0, 0.0, 0.0
    items = [item for _, item in numbered]
    with UnitReader(items, allow_changed=loading.settings.allow_changed) as reader:
        for index, item in numbered:
            timer = ItemTimer()
            for event in loading.read(item, reader):
                timer.opened()
                events.append((index, packed(event)))
                size += event.audio.nbytes if isinstance(event, Chunk) else 0
                if size >= PARCEL_BYTES:
                    start = time.perf_counter()
                    yield Parcel(tuple(events))
                    timer.waited(time.perf_counter() - start)
                    events, size = [], 0
            read, decoded = read + timer.read_seconds, decoded + timer.decode_seconds
    yield Parcel(tuple(events), read, decoded)


def packed(event: Event) -> Event:
    """Convert a chunk to 16-bit samples if that is exact; return other events unchanged."""
    if not isinstance(event, Chunk):
        return event
    for part in (event.audio[:, :256], event.audio):  # inexact chunks usually differ at the start
        scaled = part * np.float32(32768)
        whole = np.clip(scaled, -32768, 32767).astype(np.int16)
        if not np.array_equal(whole, scaled):
            return event
    return Chunk(event.frame, whole)  # type: ignore[arg-type]  # int16 until `unpacked`


def unpacked(event: Event) -> Event:
    """Undo `packed`."""
    if isinstance(event, Chunk) and event.audio.dtype == np.int16:
        return Chunk(event.frame, event.audio.astype(np.float32) / np.float32(32768))
    return event


@ray.remote(num_cpus=1, max_retries=0, scheduling_strategy="SPREAD")
def _load(items: Sequence[Numbered], loading: Loading) -> Iterator[Parcel]:
    yield from parcels(items, loading)


@dataclass
class _TaskItems:
    """The items of one task, the task after its start, and the number of events sent per item."""

    items: list[Numbered]
    task: Any = None
    sent: Counter[int] = field(default_factory=Counter)


class RemoteAudio:
    """A `UnitAudio` whose items are loaded by Ray tasks, of which `tasks` run at once.

    The tasks start when iteration starts, because a task keeps its core while it waits for its
    parcels to be received: only the unit whose turn it is may use cores. If a task dies, its
    unfinished items are loaded again by one task each. So an item that ends its task every time
    fails alone.
    """

    def __init__(
        self, items: Sequence[Item], loading: Loading, meter: Meter, *, tasks: int
    ) -> None:
        self._items = items
        self._loading = loading
        self._meter = meter
        self._tasks = tasks
        self._pending = deque(_TaskItems(part) for part in split(items))
        self._delivered: Counter[int] = Counter()  # number of events by item
        self._finished: set[int] = set()
        self._losses: Counter[tuple[str, int]] = Counter()  # by kind and item
        self._stop = threading.Event()
        self._queue: queue.Queue[Parcel | BaseException | None] = queue.Queue(PARCELS_AHEAD)
        self._thread = threading.Thread(target=self._pull, name="load-tasks", daemon=True)

    def __iter__(self) -> Iterator[ItemEvent]:
        self._thread.start()
        while True:
            start = time.perf_counter()
            parcel = self._queue.get()
            self._meter.add("wait_seconds", time.perf_counter() - start)
            if parcel is None:
                return
            if isinstance(parcel, BaseException):
                raise parcel
            self._meter.add("read_seconds", parcel.read_seconds)
            self._meter.add("decode_seconds", parcel.decode_seconds)
            for index, event in parcel.events:
                yield index, self._items[index], unpacked(event)

    @property
    def queued(self) -> int:
        waiting = tuple(self._queue.queue)
        return sum(len(parcel.events) for parcel in waiting if isinstance(parcel, Parcel))

    def close(self) -> None:
        self._stop.set()
        if self._thread.ident is not None:
            self._thread.join()
        for part in self._pending:
            _cancel(part)

    def _start(self) -> None:
        for part in islice(self._pending, self._tasks):
            if part.task is None:
                part.task = _load.options(_generator_backpressure_num_objects=PARCELS_AHEAD).remote(
                    part.items, self._loading
                )

    def _pull(self) -> None:
        """Queue the parcels of all tasks in order. Runs in its own thread."""
        last: BaseException | None = None
        try:
            self._start()
            while self._pending and not self._stop.is_set():
                self._receive(self._pending[0])
        except Exception as error:  # noqa: BLE001  the thread that iterates raises it
            cause = getattr(error, "cause", None)
            last = cause if isinstance(cause, LatentmillError) else error
        put(self._queue, last, self._stop)

    def _receive(self, part: _TaskItems) -> None:
        ready, _ = ray.wait([part.task], timeout=WAIT_SECONDS, fetch_local=False)
        if not ready:
            return
        try:
            parcel = ray.get(next(part.task))
        except StopIteration:
            self._pending.popleft()
            self._start()
        except _LOSSES as error:
            self._lost(part, classify(error))
        else:
            self._deliver(part, parcel)

    def _deliver(self, part: _TaskItems, parcel: Parcel) -> None:
        """Queue a parcel's events, without those that an earlier task of the item delivered."""
        fresh: list[tuple[int, Event]] = []
        for index, event in parcel.events:
            part.sent[index] += 1
            new = part.sent[index] > self._delivered[index]
            end = isinstance(event, Facts | Outcome)
            if new:
                fresh.append((index, event))
            elif end:  # the item now has fewer chunks than were delivered
                reason = "the file became shorter between two attempts to load it"
                failed = Outcome(self._items[index].key, "failed", reason)
                fresh.append((index, event if isinstance(event, Outcome) else failed))
            self._delivered[index] += new
            if end:
                self._finished.add(index)
        parcel = replace(parcel, events=tuple(fresh))
        put(self._queue, parcel, self._stop)

    def _lost(self, part: _TaskItems, loss: Loss) -> None:
        """Load the unfinished items of a lost task again, in one task each."""
        rest = [numbered for numbered in part.items if numbered[0] not in self._finished]
        if len(part.items) == 1 and rest:  # of several items, the one at fault is unknown
            index, item = rest[0]
            self._losses[loss.kind, index] += 1
            most = MAX_ATTEMPTS if loss.kind == "worker" else MAX_NODE_LOSSES
            if self._losses[loss.kind, index] >= most:
                reason = f"loading it ends the process ({loss.reason.rstrip('.')})"
                opened = [] if self._delivered[index] else [(index, Opened(0))]
                outcome = Outcome(item.key, "failed", reason)
                put(self._queue, Parcel((*opened, (index, outcome))), self._stop)
                rest = []
        for one in self._pending:  # later tasks would keep cores that the new tasks need
            _cancel(one)
        self._pending.popleft()
        self._pending.extendleft(_TaskItems([numbered]) for numbered in reversed(rest))
        self._start()


def _cancel(part: _TaskItems) -> None:
    if part.task is not None:
        with contextlib.suppress(RayError):
            ray.cancel(part.task)
        part.task = None


def split(items: Sequence[Item]) -> Iterator[list[Numbered]]:
    """Split a unit's items into tasks: a long item alone, short neighbours together.

    Items that share bytes stay in one task: segments of a recording, cells of a row group.
    """
    part: list[Numbered] = []
    seconds = 0.0
    for number, item in enumerate(items):
        full = seconds >= TASK_SECONDS or len(part) >= TASK_ITEMS
        if full and _shared(item) != _shared(part[-1][1]):
            yield part
            part, seconds = [], 0.0
        part.append((number, item))
        duration = item.segment.duration if item.segment else None
        seconds += duration or item.seconds or item.size / BYTES_PER_SECOND or TASK_SECONDS
    if part:
        yield part


def _shared(item: Item) -> tuple[str, int]:
    """Identifies the bytes that are read together for an item."""
    if isinstance(item.place, TableCell):
        return item.uri, item.place.row_group
    return (item.uri if item.segment else item.key), 0
