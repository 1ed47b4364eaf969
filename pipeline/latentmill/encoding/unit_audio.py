"""Loads a unit's audio in threads ahead of the model, and splits it into chunks."""

from __future__ import annotations

import itertools
import queue
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Protocol, TypeAlias, TypeVar

from latentmill.audio import AudioStream, open_audio, prepare
from latentmill.encoding.chunks import Chunk, Chunker, Chunking
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

T = TypeVar("T")

QUEUE_CHUNKS = 16  # loaded chunks per item that wait for the model


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
        chunker = Chunker(spec, self.chunking)
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
            waveform = prepare(stream, sample_rate=spec.sample_rate, channels=spec.channels)
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
        """The events of all items, in the order of the items; see `Loading.read`."""
        ...

    @property
    def queued(self) -> int:
        """Number of loaded events that were not taken yet. Thread-safe."""
        ...

    def close(self) -> None:
        """Stop loading, also before the end of the unit."""
        ...


class LocalAudio:
    """A `UnitAudio` that is loaded by threads of this process. They start at once."""

    def __init__(self, items: Sequence[Item], loading: Loading, meter: Meter) -> None:
        settings = loading.settings
        self._loading = loading
        self._meter = meter
        self._reader = UnitReader(items, allow_changed=settings.allow_changed)
        self._stop = threading.Event()
        self._pool = ThreadPoolExecutor(settings.load_threads, thread_name_prefix="load")
        self._waiting = iter(enumerate(items))
        self._running: deque[tuple[int, Item, queue.Queue[Event | Exception]]] = deque()
        for _ in range(settings.load_threads + 1):
            self._submit()

    def __iter__(self) -> Iterator[ItemEvent]:
        while self._running:
            index, item, events = self._running[0]
            while True:
                start = time.perf_counter()
                event = events.get()
                self._meter.add("wait_seconds", time.perf_counter() - start)
                if isinstance(event, Exception):
                    raise event
                yield index, item, event
                if isinstance(event, Facts | Outcome):
                    break
            self._running.popleft()
            self._submit()

    @property
    def queued(self) -> int:
        return sum(events.qsize() for _, _, events in tuple(self._running))

    def close(self) -> None:
        self._stop.set()
        self._reader.stop()
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._reader.close()

    def _submit(self) -> None:
        for index, item in itertools.islice(self._waiting, 1):
            events: queue.Queue[Event | Exception] = queue.Queue(QUEUE_CHUNKS)
            self._running.append((index, item, events))
            self._pool.submit(self._read, item, events)

    def _read(self, item: Item, events: queue.Queue[Event | Exception]) -> None:
        try:
            self._read_timed(item, events)
        except Exception as error:  # noqa: BLE001  the thread that iterates raises it
            put(events, error, self._stop)

    def _read_timed(self, item: Item, events: queue.Queue[Event | Exception]) -> None:
        timer = ItemTimer()
        for event in self._loading.read(item, self._reader):
            timer.opened()
            start = time.perf_counter()
            put(events, event, self._stop)
            timer.waited(time.perf_counter() - start)
            if self._stop.is_set():
                return
        self._meter.add("read_seconds", timer.read_seconds)
        self._meter.add("decode_seconds", timer.decode_seconds)


def put(events: queue.Queue[T], event: T, stop: threading.Event) -> None:
    """Put an event into a bounded queue, unless `stop` is set while it is full."""
    while not stop.is_set():
        try:
            events.put(event, timeout=0.2)
        except queue.Full:
            continue
        break


class ItemTimer:
    """Measures the time to open and to load one item, without the time that its queue was full."""

    def __init__(self) -> None:
        self._began = time.perf_counter()
        self._waited = 0.0
        self._opened: float | None = None

    def opened(self) -> None:
        """Note that the item is open. Only the first call counts."""
        if self._opened is None:
            self._opened = time.perf_counter() - self._began

    def waited(self, seconds: float) -> None:
        """Subtract time in which the queue was full."""
        self._waited += seconds

    @property
    def read_seconds(self) -> float:
        """Seconds until the item was open, including the time to fetch it."""
        return self._opened or 0.0

    @property
    def decode_seconds(self) -> float:
        """Seconds of loading since the item was open."""
        return time.perf_counter() - self._began - self._waited - self.read_seconds


def _failed(item: Item, reason: str) -> Outcome:
    return Outcome(item.key, "failed", " ".join(reason.split()))  # one line


def _skipped(item: Item, reason: str) -> Outcome:
    return Outcome(item.key, "skipped", reason)
