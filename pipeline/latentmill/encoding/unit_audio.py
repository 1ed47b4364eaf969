"""Loads a unit's audio in threads ahead of the model, and splits it into chunks."""

from __future__ import annotations

import itertools
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Protocol, TypeAlias

from latentmill.audio import AudioStream, open_audio, prepare
from latentmill.encoding.chunks import Chunk, Chunker, Chunking
from latentmill.encoding.idle_threads import IdleThreads
from latentmill.encoding.lanes import LANES, PACKING, Numbered, in_turn, lanes_of
from latentmill.encoding.loudness import LevelMeter
from latentmill.encoding.timings import Meter
from latentmill.errors import ItemError
from latentmill.models.base import ModelSpec
from latentmill.models.inference.precision import Precision
from latentmill.record import Outcome
from latentmill.sources.base import Item, Segment
from latentmill.sources.filters import NO_FILTERS, Filters
from latentmill.sources.metadata import read_metadata
from latentmill.sources.reading import UnitReader

BUFFER_BYTES = 32 << 20  # per load thread: loaded audio of a unit that waits for the model


@dataclass(frozen=True)
class EncodeSettings:
    """Settings for encoding a unit, apart from the model and the chunking."""

    dtype: str = "float16"
    precision: Precision = "float32"
    batch_size: int = 1
    load_threads: int = 2
    allow_truncated: bool = False
    load_timeout: float | None = None  # seconds for loading an item, in addition to its length
    allow_changed: bool = False  # for a retry: accept files that were repaired after planning
    filters: Filters = NO_FILTERS
    packing: int = PACKING
    pooled: bool = False  # of a field of vectors: store the mean over all frames of an item


@dataclass(frozen=True)
class Opened:
    """Event after reading an item's header. `frames` is the expected length, 0 if unknown."""

    frames: int


@dataclass(frozen=True)
class Facts:
    """Event at the end of an item's audio, with what was measured."""

    source_sample_rate: int
    source_channels: int
    content_hash: str
    num_samples: int
    rms: float
    peak: float
    levels: bytes
    metadata: dict[str, object]


Event: TypeAlias = Opened | Chunk | Facts | Outcome

# The number of an item in its unit, the item, and an event of it.
ItemEvent: TypeAlias = tuple[int, Item, Event]


@dataclass(frozen=True)
class Loading:
    """Loads items and splits them into chunks, with equal results in every process. Picklable.

    `refused` has the items that fail without being read, by key, with the reason.
    """

    spec: ModelSpec
    chunking: Chunking
    settings: EncodeSettings
    refused: Mapping[str, str] = field(default_factory=dict)

    def read(self, item: Item, reader: UnitReader) -> Iterator[Event]:
        """Yield one item's events in order. The last one is always `Facts` or an `Outcome`."""
        opened = False
        try:
            if item.key in self.refused:
                raise ItemError(self.refused[item.key])
            for event in self._events(item, reader):
                opened = True
                yield event
        except ItemError as error:
            last = _failed(item, str(error))
        except Exception as error:  # noqa: BLE001  an unexpected error fails the item, not the unit
            last = _failed(item, f"{type(error).__name__} while reading: {error}")
        else:
            return
        finally:
            reader.release(item)
        if not opened:
            yield Opened(0)
        yield last

    def _events(self, item: Item, reader: UnitReader) -> Iterator[Event]:
        """Yield `Opened`, the chunks and `Facts`, or an `Outcome` if a filter skips the item."""
        spec, settings, filters = self.spec, self.settings, self.settings.filters
        metadata = read_metadata(item)
        if reason := filters.of_source(item, metadata):
            yield from (Opened(0), _skipped(item, reason))
            return
        with reader.open(item) as media:
            part = item.segment or Segment(0.0)
            stream = open_audio(
                media,
                start=part.start,
                duration=part.duration,
                allow_truncated=settings.allow_truncated,
                time_limit=settings.load_timeout,
            )
            promised = (stream.num_samples or 0) * spec.sample_rate // stream.sample_rate
            yield Opened(spec.frames(spec.padded(promised)) + 1 if promised else 0)
            if reason := self._unwanted(stream, promised):
                yield _skipped(item, reason)
                return
            expected = -(-(stream.num_samples or 0) * spec.sample_rate // stream.sample_rate)
            chunker = Chunker(spec, self.chunking, expected)
            waveform = prepare(
                stream,
                sample_rate=spec.sample_rate,
                channels=spec.channels,
                helpers=reader.helpers,
            )
            meter = LevelMeter(spec)
            for block in waveform.blocks():
                meter.push(block)
                yield from chunker.push(block)
            stats = waveform.stats
            seconds = stats.num_samples / spec.sample_rate
            if reason := filters.of_length(seconds) or filters.of_audio(stats.rms):
                yield _skipped(item, reason)
                return
            yield from chunker.finish()
            yield Facts(
                source_sample_rate=stream.sample_rate,
                source_channels=stream.channels,
                content_hash=reader.content_hash(item, media),
                num_samples=stats.num_samples,
                rms=stats.rms,
                peak=stats.peak,
                levels=meter.finish(spec.frames(spec.padded(stats.num_samples))),
                metadata=metadata,
            )

    def _unwanted(self, stream: AudioStream, promised: int) -> str | None:
        """Why a filter skips an item by its header, or None."""
        filters = self.settings.filters
        reason = filters.of_header(stream.sample_rate, stream.channels)
        if promised and not reason:
            reason = filters.of_length(promised / self.spec.sample_rate)
        return reason


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
    """A lane's events, and those that are loaded and wait for the model."""

    def __init__(self, events: Iterator[ItemEvent]) -> None:
        self.events = events
        self.loaded: deque[ItemEvent] = deque()
        self.busy = False  # a thread loads its next event
        self.ended = False  # all events are loaded, or loading them failed
        self.error: Exception | None = None


class LocalAudio:
    """A `UnitAudio` that is loaded by threads of this process. They start at once.

    Each thread loads up to the next chunk of the lane that has the fewest loaded ones, because the
    model will need that lane first. If `BUFFER_BYTES` per thread are loaded, only lanes that have
    nothing loaded go on. Threads that no lane needs load pieces of long recordings.
    """

    def __init__(self, items: Sequence[Item], loading: Loading, meter: Meter) -> None:
        settings = loading.settings
        self._loading = loading
        self._meter = meter
        self._in_turn = settings.packing > 1
        self._reader = UnitReader(items, allow_changed=settings.allow_changed)
        self._changed = threading.Condition()  # guards what follows
        self._stopped = False
        self._idle = IdleThreads(self._changed, settings.load_threads, meter)
        self._reader.helpers = self._idle
        self._waiting = deque(
            _Lane(self._events(lane)) for lane in lanes_of(items, settings.packing)
        )
        self._lanes: list[_Lane] = []  # those that are loaded now
        self._open_lanes()
        self._limit = settings.load_threads * BUFFER_BYTES
        self._size = 0  # bytes of the loaded audio
        self._pool = ThreadPoolExecutor(settings.load_threads, thread_name_prefix="load")
        for _ in range(settings.load_threads):
            self._pool.submit(self._load)

    def __iter__(self) -> Iterator[ItemEvent]:
        with self._changed:
            lanes = [self._taken(lane) for lane in (*self._lanes, *self._waiting)]
        return in_turn(lanes) if self._in_turn else itertools.chain(*lanes)

    @property
    def queued(self) -> int:
        with self._changed:
            return sum(len(lane.loaded) for lane in self._lanes)

    def close(self) -> None:
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
        self._reader.stop()
        self._pool.shutdown(wait=True, cancel_futures=True)
        for lane in self._lanes:
            lane.events.close()  # type: ignore[attr-defined]  # closes the item's file
        self._reader.close()

    def _events(self, lane: list[Numbered]) -> Iterator[ItemEvent]:
        for number, item in lane:
            for event in self._loading.read(item, self._reader):
                yield number, item, event

    def _open_lanes(self) -> None:
        while self._waiting and len(self._lanes) < LANES:
            self._lanes.append(self._waiting.popleft())

    def _taken(self, lane: _Lane) -> Iterator[ItemEvent]:
        """Take a lane's loaded events, and wait for those that are not loaded yet."""
        while True:
            start = time.perf_counter()
            with self._changed:
                self._changed.wait_for(lambda: lane.loaded or lane.ended)
                if not lane.loaded:
                    self._lanes.remove(lane)
                    self._open_lanes()
                    self._changed.notify_all()
                    break
                events = [lane.loaded.popleft()]
                self._size -= _bytes(events[0])
                while lane.loaded and not _bytes(lane.loaded[0]):  # what has no audio costs little
                    events.append(lane.loaded.popleft())
                self._changed.notify_all()
            self._meter.add("wait_seconds", time.perf_counter() - start)
            yield from events
        if lane.error is not None:
            raise lane.error

    def _load(self) -> None:
        """Load until all lanes have ended. Runs in every thread of the pool."""
        while (lane := self._next_lane()) is not None:
            if isinstance(lane, IdleThreads):
                lane.load_one()
                continue
            loaded: list[ItemEvent] = []
            ended, error = True, None
            start = time.perf_counter()
            try:
                for item_event in lane.events:
                    loaded.append(item_event)
                    opened = isinstance(item_event[2], Opened)
                    now = time.perf_counter()
                    self._meter.add("read_seconds" if opened else "decode_seconds", now - start)
                    start = now
                    if self._stopped or _bytes(item_event):
                        ended = False
                        break
            except Exception as caught:  # noqa: BLE001  the thread that iterates raises it
                error = caught
            with self._changed:
                lane.busy, lane.ended, lane.error = False, ended, error
                lane.loaded += loaded
                self._size += sum(map(_bytes, loaded))
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
                free = [one for one in unfinished if not (one.busy or (full and one.loaded))]
                if free:
                    lane = min(free, key=lambda one: len(one.loaded))
                    lane.busy = True
                    return lane
                if self._idle.waiting and not full:
                    return self._idle
                self._changed.wait()
        return None


def _bytes(item_event: ItemEvent) -> int:
    event = item_event[2]
    return event.audio.nbytes if isinstance(event, Chunk) else 0


def _failed(item: Item, reason: str) -> Outcome:
    return Outcome(item.key, "failed", " ".join(reason.split()))  # one line


def _skipped(item: Item, reason: str) -> Outcome:
    return Outcome(item.key, "skipped", reason)
