"""A unit's audio decoded by Ray tasks, on whatever nodes have free CPU cores.

A task decodes a run of neighbouring items and sends their chunks in parcels through Ray's object
store. It stops when some parcels wait to be taken. Samples travel as 16 bits where that is exact.
"""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
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
from latentmill.encoding.unit_audio import Decoding, Event, Facts, Heard, ItemTimer, Opened
from latentmill.engine.dispatch import MAX_ATTEMPTS, MAX_NODE_LOSSES, Loss
from latentmill.engine.loss import classify
from latentmill.errors import LatentmillError
from latentmill.record import Outcome
from latentmill.sources.base import Item, TableCell
from latentmill.sources.reading import UnitReader

PARCEL_BYTES = 2 << 20
PARCELS_AHEAD = 4  # of a task, and as many again of the unit
RUN_SECONDS = 60.0  # of audio per task: short items share one
RUN_ITEMS = 64
BYTES_A_SECOND = 32_000  # of audio whose length is not known

WAIT_SECONDS = 1.0  # until it is looked whether all this is still wanted

# With these a task is gone; any other error is not its item's fault.
_LOSSES = (WorkerCrashedError, OutOfMemoryError, NodeDiedError, ObjectLostError)

Numbered: TypeAlias = tuple[int, Item]  # an item and its number in the unit


@dataclass(frozen=True)
class Parcel:
    """What a task sends at once: events by item number, and the seconds that it has spent."""

    events: tuple[tuple[int, Event], ...]
    read_seconds: float = 0.0
    decode_seconds: float = 0.0


def parcels(run: Sequence[Numbered], decoding: Decoding) -> Iterator[Parcel]:
    """Decode items one after the other. Deterministic but for the seconds."""
    events: list[tuple[int, Event]] = []
    size, read, decoded = 0, 0.0, 0.0
    items = [item for _, item in run]
    with UnitReader(items, allow_changed=decoding.settings.allow_changed) as reader:
        for index, item in run:
            watch = ItemTimer()
            for event in decoding.read(item, reader):
                watch.opened()
                events.append((index, packed(event)))
                size += event.audio.nbytes if isinstance(event, Chunk) else 0
                if size >= PARCEL_BYTES:
                    start = time.perf_counter()
                    yield Parcel(tuple(events))
                    watch.waited(time.perf_counter() - start)
                    events, size = [], 0
            read, decoded = read + watch.read_seconds, decoded + watch.decode_seconds
    yield Parcel(tuple(events), read, decoded)


def packed(event: Event) -> Event:
    """A chunk with 16-bit samples if they say all; any other event as it is."""
    if not isinstance(event, Chunk):
        return event
    for part in (event.audio[:, :256], event.audio):  # most that do not fit differ at once
        scaled = part * np.float32(32768)
        whole = np.clip(scaled, -32768, 32767).astype(np.int16)
        if not np.array_equal(whole, scaled):
            return event
    return Chunk(event.frame, whole)  # type: ignore[arg-type]  # on its way only


def unpacked(event: Event) -> Event:
    """What was packed."""
    if isinstance(event, Chunk) and event.audio.dtype == np.int16:
        return Chunk(event.frame, event.audio.astype(np.float32) / np.float32(32768))
    return event


@ray.remote(num_cpus=1, max_retries=0, scheduling_strategy="SPREAD")
def _decode(run: Sequence[Numbered], decoding: Decoding) -> Iterator[Parcel]:
    yield from parcels(run, decoding)


@dataclass
class _Run:
    """Items for one task, the task once it is started, and how many events of each it has sent."""

    items: list[Numbered]
    task: Any = None
    sent: Counter[int] = field(default_factory=Counter)


class RemoteAudio:
    """A `UnitAudio` of Ray tasks.

    They start when it is iterated over, not before: a task that waits for its parcels to be taken
    keeps its core, so only those may have one whose parcels are being taken. A task that dies is
    started again without what is finished, an item at a time: an item that ends its task again and
    again fails, and the others do not.

    Args:
        items: Of the unit.
        decoding: How they are decoded.
        meter: Counts the seconds of reading, decoding and waiting.
        tasks: How many run at once.
    """

    def __init__(
        self, items: Sequence[Item], decoding: Decoding, meter: Meter, *, tasks: int
    ) -> None:
        self._items = items
        self._decoding = decoding
        self._meter = meter
        self._tasks = tasks
        self._runs = deque(_Run(run) for run in runs(items))
        self._delivered: Counter[int] = Counter()  # events by item
        self._finished: set[int] = set()
        self._losses: Counter[tuple[str, int]] = Counter()  # by kind and item
        self._stop = threading.Event()
        self._queue: queue.Queue[Parcel | BaseException | None] = queue.Queue(PARCELS_AHEAD)
        self._thread = threading.Thread(target=self._pull, name="load-tasks", daemon=True)

    def __iter__(self) -> Iterator[Heard]:
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
        """Chunks and other events that are here and not taken yet."""
        waiting = tuple(self._queue.queue)
        return sum(len(parcel.events) for parcel in waiting if isinstance(parcel, Parcel))

    def close(self) -> None:
        """Stop the tasks."""
        self._stop.set()
        if self._thread.ident is not None:
            self._thread.join()
        for run in self._runs:
            _cancel(run)

    def _start(self) -> None:
        for run in islice(self._runs, self._tasks):
            if run.task is None:
                run.task = _decode.options(
                    _generator_backpressure_num_objects=PARCELS_AHEAD
                ).remote(run.items, self._decoding)

    def _pull(self) -> None:
        """Pass on the parcels of the runs in order, from a thread of its own."""
        last: BaseException | None = None
        try:
            self._start()
            while self._runs and not self._stop.is_set():
                self._take(self._runs[0])
        except Exception as error:  # noqa: BLE001  the thread that iterates raises it
            cause = getattr(error, "cause", None)
            last = cause if isinstance(cause, LatentmillError) else error
        self._put(last)

    def _take(self, run: _Run) -> None:
        ready, _ = ray.wait([run.task], timeout=WAIT_SECONDS, fetch_local=False)
        if not ready:
            return
        try:
            parcel = ray.get(next(run.task))
        except StopIteration:
            self._runs.popleft()
            self._start()
        except _LOSSES as error:
            self._lost(run, classify(error))
        else:
            self._deliver(run, parcel)

    def _deliver(self, run: _Run, parcel: Parcel) -> None:
        """Pass on what is new in a parcel: a task that was started again repeats itself."""
        fresh: list[tuple[int, Event]] = []
        for index, event in parcel.events:
            run.sent[index] += 1
            new = run.sent[index] > self._delivered[index]
            end = isinstance(event, Facts | Outcome)
            if new:
                fresh.append((index, event))
            elif end:  # it has fewer chunks now than were passed on, or none
                reason = "it was longer when it was read for the first time"
                failed = Outcome(self._items[index].key, "failed", reason)
                fresh.append((index, event if isinstance(event, Outcome) else failed))
            self._delivered[index] += new
            if end:
                self._finished.add(index)
        self._put(Parcel(tuple(fresh), parcel.read_seconds, parcel.decode_seconds))

    def _lost(self, run: _Run, loss: Loss) -> None:
        """A task is gone: go on with the item that it was at, and the others one by one."""
        rest = [numbered for numbered in run.items if numbered[0] not in self._finished]
        if len(run.items) == 1 and rest:  # of several nobody knows which one it was
            index, item = rest[0]
            self._losses[loss.kind, index] += 1
            most = MAX_ATTEMPTS if loss.kind == "worker" else MAX_NODE_LOSSES
            if self._losses[loss.kind, index] >= most:
                reason = f"decoding it ends the process ({loss.reason.rstrip('.')})"
                opened = [] if self._delivered[index] else [(index, Opened(0))]
                outcome = Outcome(item.key, "failed", reason)
                self._put(Parcel((*opened, (index, outcome))))
                rest = []
        for one in self._runs:  # the later ones would keep their cores from the new ones
            _cancel(one)
        self._runs.popleft()
        self._runs.extendleft(_Run([numbered]) for numbered in reversed(rest))
        self._start()

    def _put(self, parcel: Parcel | BaseException | None) -> None:
        while not self._stop.is_set():
            try:
                self._queue.put(parcel, timeout=0.2)
            except queue.Full:
                continue
            break


def _cancel(run: _Run) -> None:
    if run.task is not None:
        with contextlib.suppress(RayError):
            ray.cancel(run.task)
        run.task = None


def runs(items: Sequence[Item]) -> Iterator[list[Numbered]]:
    """Cut a unit into runs of neighbours: a long item alone, short ones together.

    What neighbours share is read by one task: parts of a recording, cells of a row group.
    """
    run: list[Numbered] = []
    seconds = 0.0
    for number, item in enumerate(items):
        full = seconds >= RUN_SECONDS or len(run) >= RUN_ITEMS
        if full and _shared(item) != _shared(run[-1][1]):
            yield run
            run, seconds = [], 0.0
        run.append((number, item))
        part = item.segment.duration if item.segment else None
        seconds += part or item.seconds or item.size / BYTES_A_SECOND or RUN_SECONDS
    if run:
        yield run


def _shared(item: Item) -> tuple[str, int]:
    """What an item's bytes are read with."""
    if isinstance(item.place, TableCell):
        return item.uri, item.place.row_group
    return (item.uri if item.segment else item.key), 0
