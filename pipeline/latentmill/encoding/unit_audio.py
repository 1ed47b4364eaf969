"""Loads a unit's audio in threads ahead of the model, or of several models."""

from __future__ import annotations

import itertools
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

from latentmill.encoding.chunks import Chunk
from latentmill.encoding.idle_threads import IdleThreads
from latentmill.encoding.lanes import LANES, Numbered, in_turn, lanes_of
from latentmill.encoding.loading import Event, ItemEvent, Loading, Opened, read_together
from latentmill.encoding.timings import Timings
from latentmill.sources.base import Item
from latentmill.sources.reading import UnitReader

BUFFER_BYTES = 32 << 20  # per load thread and model: loaded audio of a unit that waits for it


class LoadingStopped(Exception):  # noqa: N818  nothing is wrong
    """A unit's loading was stopped before its end."""


class UnitAudio(Protocol):
    """A unit's audio, which is loaded ahead of the thread that iterates over it."""

    def __iter__(self) -> Iterator[ItemEvent]:
        """The events of all items, each item's in order (see `Loading.read`), from one lane after
        the other.
        """
        ...

    @property
    def queued(self) -> int:
        """Number of loaded events that were not taken yet. Thread-safe."""
        ...

    def close(self) -> None:
        """Stop loading, also before the end of the unit."""
        ...


class _Lane:
    """A lane's events, each for one model, and those that are loaded and wait for their model."""

    def __init__(self, events: Iterator[tuple[int, ItemEvent]], models: int) -> None:
        self.events = events
        self.loaded: list[deque[ItemEvent]] = [deque() for _ in range(models)]
        self.busy = False  # a thread loads its next event
        self.ended = False  # all events are loaded, or loading them failed
        self.error: Exception | None = None
        self.takers = set(range(models))  # models that have not taken all events


class SharedAudio:
    """A unit's audio, which threads of this process load once for several models.

    They start at once. Each thread loads up to the next chunk of the lane that has the fewest
    loaded ones for any model, because this model will need that lane first. If `BUFFER_BYTES` per
    thread and model are loaded, only lanes continue that have nothing loaded for the slowest model,
    which has the most waiting bytes. So the others wait for it, and it never waits for them.
    With one model, threads that no lane needs load pieces of long recordings.
    """

    def __init__(
        self, items: Sequence[Item], loadings: Sequence[Loading], timings: Sequence[Timings]
    ) -> None:
        settings = loadings[0].settings
        self._loadings = loadings
        self._timings = timings  # of the models; the first one counts the loading
        self._in_turn = settings.packing > 1
        read = [item for item in items if item.key not in loadings[0].absent]
        self._reader = UnitReader(
            read,
            allow_changed=settings.allow_changed,
            unchanged=loadings[0].encoded,
            on_bytes=timings[0].step,
        )
        self._changed = threading.Condition()  # guards what follows
        self._stopped = False
        self._left: set[int] = set()  # models that take no more events
        self._idle = IdleThreads(self._changed, settings.load_threads, timings[0])
        self._reader.helpers = self._idle
        self._waiting = deque(
            _Lane(self._events(lane), len(loadings)) for lane in lanes_of(items, settings.packing)
        )
        self._all = list(self._waiting)
        self._lanes: list[_Lane] = []  # those that are loaded now
        self._open_lanes()
        self._limit = self._limit_of(len(loadings))
        self._sizes = [0] * len(loadings)  # bytes of the loaded audio, by model
        self._pool = ThreadPoolExecutor(settings.load_threads, thread_name_prefix="load")
        for _ in range(settings.load_threads):
            self._pool.submit(self._load)

    def shares(self) -> list[UnitAudio]:
        """The audio for each model.

        Closing the first one before its end stops the loading for all models, closing another one
        for that model.
        """
        return [_AudioOfModel(self, number) for number in range(len(self._loadings))]

    def events(self, model: int) -> Iterator[ItemEvent]:
        """The events for a model; raises LoadingStopped if they will never be loaded."""
        lanes = [self._taken(lane, model) for lane in self._all]
        return in_turn(lanes) if self._in_turn else itertools.chain(*lanes)

    def queued_for(self, model: int) -> int:
        """Number of loaded events that a model has not taken yet. Thread-safe."""
        with self._changed:
            return sum(len(lane.loaded[model]) for lane in self._lanes)

    def stop(self) -> None:
        """Load nothing more. Thread-safe."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
        self._reader.stop()

    def leave(self, model: int) -> None:
        """Keep nothing more for a model; the others go on. Thread-safe."""
        with self._changed:
            self._left.add(model)
            self._sizes[model] = 0
            self._limit = self._limit_of(len(self._loadings) - len(self._left))
            for lane in self._all:
                lane.loaded[model].clear()
                if lane.ended:
                    self._is_taken(lane, model)
            self._changed.notify_all()

    def close(self) -> None:
        """Stop loading, also before the end of the unit."""
        self.stop()
        self._pool.shutdown(wait=True, cancel_futures=True)
        for lane in self._lanes:
            lane.events.close()  # type: ignore[attr-defined]  # closes the item's file
        self._reader.close()

    def _limit_of(self, models: int) -> int:
        """How many bytes of loaded audio may wait for this number of models."""
        return self._loadings[0].settings.load_threads * BUFFER_BYTES * models

    def _prefetched(self, lane: _Lane) -> int:
        """Number of a lane's loaded events for the model that will need this lane first."""
        if not self._left:
            return min(map(len, lane.loaded))
        return min(len(one) for model, one in enumerate(lane.loaded) if model not in self._left)

    @property
    def _size(self) -> int:
        return sum(self._sizes)

    def _events(self, lane: list[Numbered]) -> Iterator[tuple[int, ItemEvent]]:
        for number, item in lane:
            for model, event in self._read(item):
                yield model, (number, item, event)

    def _read(self, item: Item) -> Iterator[tuple[int, Event]]:
        return read_together(self._loadings, item, self._reader)

    def _open_lanes(self) -> None:
        while self._waiting and len(self._lanes) < LANES:
            self._lanes.append(self._waiting.popleft())

    def _is_taken(self, lane: _Lane, model: int) -> None:
        """Called when a model has taken all events of a lane, or needs none of them."""
        lane.takers.discard(model)
        if not lane.takers and lane in self._lanes:
            self._lanes.remove(lane)
            self._open_lanes()
            self._changed.notify_all()

    def _taken(self, lane: _Lane, model: int) -> Iterator[ItemEvent]:
        """Take a lane's loaded events, and wait for those that are not loaded yet."""
        loaded, timings = lane.loaded[model], self._timings[model]
        while True:
            start = time.perf_counter()
            with self._changed:
                self._changed.wait_for(lambda: loaded or lane.ended or self._stopped)
                if not loaded:
                    if not lane.ended or model in self._left:
                        raise LoadingStopped
                    self._is_taken(lane, model)
                    break
                events = [loaded.popleft()]
                if self._size >= self._limit:  # else no thread waits for events to be taken
                    self._changed.notify_all()
                self._sizes[model] -= _bytes(events[0])
                while loaded and not _bytes(loaded[0]):  # what has no audio costs little
                    events.append(loaded.popleft())
            timings.add("wait_seconds", time.perf_counter() - start)
            yield from events
        if lane.error is not None:
            raise lane.error

    def _load(self) -> None:
        """Load until all lanes have ended. Runs in every thread of the pool."""
        timings = self._timings[0]
        while (lane := self._next_lane()) is not None:
            if isinstance(lane, IdleThreads):
                lane.load_one()
                continue
            loaded: list[tuple[int, ItemEvent]] = []
            ended, error = True, None
            start = time.perf_counter()
            try:
                for model, item_event in lane.events:
                    loaded.append((model, item_event))
                    opened = isinstance(item_event[2], Opened)
                    now = time.perf_counter()
                    timings.add("read_seconds" if opened else "decode_seconds", now - start)
                    start = now
                    if self._stopped or _bytes(item_event):
                        ended = False
                        break
            except Exception as caught:  # noqa: BLE001  the thread that iterates raises it
                error = caught
            with self._changed:
                lane.busy, lane.ended, lane.error = False, ended, error
                for model, item_event in loaded:
                    if model not in self._left:
                        lane.loaded[model].append(item_event)
                        self._sizes[model] += _bytes(item_event)
                if ended:
                    for model in self._left:
                        self._is_taken(lane, model)
                self._changed.notify_all()

    def _next_lane(self) -> _Lane | IdleThreads | None:
        """Wait for a lane that a thread may load, and reserve it, or for a piece of a recording.

        None if there is no more work.
        """
        with self._changed:
            while not self._stopped:
                unfinished = [lane for lane in self._lanes if not lane.ended]
                if not unfinished and not self._waiting:
                    break
                full = self._size >= self._limit
                last = self._sizes.index(max(self._sizes))
                free = [
                    lane for lane in unfinished if not (lane.busy or (full and lane.loaded[last]))
                ]
                if free:
                    lane = min(free, key=self._prefetched)
                    lane.busy = True
                    return lane
                if self._idle.waiting and not full:
                    return self._idle
                self._changed.wait()
        return None


class _AudioOfModel:
    """The audio of a `SharedAudio` for one model."""

    def __init__(self, audio: SharedAudio, model: int) -> None:
        self._audio, self._model = audio, model
        self._ended = False

    def __iter__(self) -> Iterator[ItemEvent]:
        yield from self._audio.events(self._model)
        self._ended = True

    @property
    def queued(self) -> int:
        return self._audio.queued_for(self._model)

    def close(self) -> None:
        if self._ended:
            return
        if self._model == 0:
            self._audio.stop()
        else:
            self._audio.leave(self._model)


class LocalAudio(SharedAudio):
    """A `UnitAudio` that is loaded by threads of this process. They start at once."""

    def __init__(self, items: Sequence[Item], loading: Loading, timings: Timings) -> None:
        super().__init__(items, [loading], [timings])

    def __iter__(self) -> Iterator[ItemEvent]:
        return self.events(0)

    @property
    def queued(self) -> int:
        return self.queued_for(0)

    def _read(self, item: Item) -> Iterator[tuple[int, Event]]:
        for event in self._loadings[0].read(item, self._reader):
            yield 0, event


def _bytes(item_event: ItemEvent) -> int:
    event = item_event[2]
    return event.audio.nbytes if isinstance(event, Chunk) else 0
