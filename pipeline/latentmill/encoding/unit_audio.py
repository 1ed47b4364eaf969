"""A unit's audio, item by item: read, decoded and cut into chunks, ahead of the model."""

from __future__ import annotations

import itertools
import queue
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Protocol, TypeAlias

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

# Chunks that a decode thread may be ahead of the model.
QUEUE_CHUNKS = 16


@dataclass(frozen=True)
class EncodeSettings:
    """What encoding a unit depends on, next to the model and the chunking."""

    dtype: str = "float16"
    precision: Precision = "float32"
    batch_size: int = 1
    load_threads: int = 2
    allow_truncated: bool = False
    load_timeout: float | None = None  # seconds an item may take, beyond its length
    allow_changed: bool = False  # for a retry: files that were mended since they were planned
    filters: Filters = NO_FILTERS


@dataclass(frozen=True)
class Opened:
    """An item's header was read: how many latent frames it promises (0 if it does not say)."""

    frames: int


@dataclass(frozen=True)
class Facts:
    """What is known of an item once its audio is read to the end."""

    source_sample_rate: int
    source_channels: int
    content_hash: str
    num_samples: int
    rms: float
    peak: float
    levels: bytes
    metadata: dict[str, object]


Event: TypeAlias = Opened | Chunk | Facts | Outcome

# What is heard of a unit: the number of an item in it, the item, and what comes next of it.
ItemEvent: TypeAlias = tuple[int, Item, Event]


@dataclass(frozen=True)
class Loading:
    """How a unit's items become chunks, the same wherever it is done. Picklable.

    Attributes:
        spec: Of the model.
        chunking: How items are cut.
        settings: Those of the run.
        refused: Items that fail unread, by key, each with the reason.
    """

    spec: ModelSpec
    chunking: Chunking
    settings: EncodeSettings
    refused: Mapping[str, str] = field(default_factory=dict)

    def read(self, item: Item, reader: UnitReader) -> Iterator[Event]:
        """Everything of one item in order; whatever happens, `Facts` or an `Outcome` end it."""
        opened = False
        try:
            if item.key in self.refused:
                raise ItemError(self.refused[item.key])
            for event in self._events(item, reader):
                opened = True
                yield event
        except ItemError as error:
            last = _failed(item, str(error))
        except Exception as error:  # noqa: BLE001  one odd file must not end the unit
            last = _failed(item, f"{type(error).__name__} while reading: {error}")
        else:
            return
        finally:
            reader.let_go(item)
        if not opened:
            yield Opened(0)
        yield last

    def _events(self, item: Item, reader: UnitReader) -> Iterator[Event]:
        """That the item is opened, its chunks, then its facts; or that it is skipped."""
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
        """What a filter has against an item, by its header."""
        filters = self.settings.filters
        reason = filters.of_header(stream.sample_rate, stream.channels)
        if promised and not reason:
            reason = filters.of_length(promised / self.spec.sample_rate)
        return reason


class UnitAudio(Protocol):
    """A unit's audio, being decoded ahead of the one thread that iterates over it."""

    def __iter__(self) -> Iterator[ItemEvent]:
        """The items in order: each is opened, gives its chunks, then its facts or its outcome."""
        ...

    @property
    def queued(self) -> int:
        """Chunks and other events that are decoded and not taken yet. Thread-safe."""
        ...

    def close(self) -> None:
        """Stop decoding, in the middle of the unit too."""
        ...


class LocalAudio:
    """A `UnitAudio` of this process's decode threads; they start at once.

    Args:
        items: Of the unit.
        decoding: How they are decoded.
        meter: Counts the seconds of reading, decoding and waiting.
    """

    def __init__(self, items: Sequence[Item], decoding: Loading, meter: Meter) -> None:
        settings = decoding.settings
        self._decoding = decoding
        self._meter = meter
        self._reader = UnitReader(items, allow_changed=settings.allow_changed)
        self._stop = threading.Event()
        self._pool = ThreadPoolExecutor(settings.load_threads, thread_name_prefix="decode")
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
        """Chunks and other events that are decoded and not taken yet."""
        return sum(events.qsize() for _, _, events in tuple(self._running))

    def close(self) -> None:
        """Stop the decode threads."""
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
        """Read one item into its queue."""
        try:
            self._read_timed(item, events)
        except Exception as error:  # noqa: BLE001  the thread that iterates raises it
            self._put(events, error)

    def _read_timed(self, item: Item, events: queue.Queue[Event | Exception]) -> None:
        watch = ItemTimer()
        for event in self._decoding.read(item, self._reader):
            watch.opened()
            start = time.perf_counter()
            self._put(events, event)
            watch.waited(time.perf_counter() - start)
            if self._stop.is_set():
                return
        self._meter.add("read_seconds", watch.read_seconds)
        self._meter.add("decode_seconds", watch.decode_seconds)

    def _put(self, events: queue.Queue[Event | Exception], event: Event | Exception) -> None:
        """Put an event into a bounded queue, unless this is closed meanwhile."""
        while not self._stop.is_set():
            try:
                events.put(event, timeout=0.2)
            except queue.Full:
                continue
            break


class ItemTimer:
    """Times one item: until it was opened, and the rest without waiting for others."""

    def __init__(self) -> None:
        self._began = time.perf_counter()
        self._waited = 0.0
        self._opened: float | None = None

    def opened(self) -> None:
        """The item is open; said more than once, the first time counts."""
        if self._opened is None:
            self._opened = time.perf_counter() - self._began

    def waited(self, seconds: float) -> None:
        """That long nobody decoded, as there was no room for more."""
        self._waited += seconds

    @property
    def read_seconds(self) -> float:
        """Until it was open, fetched included."""
        return self._opened or 0.0

    @property
    def decode_seconds(self) -> float:
        """Since then."""
        return time.perf_counter() - self._began - self._waited - self.read_seconds


def _failed(item: Item, reason: str) -> Outcome:
    return Outcome(item.key, "failed", " ".join(reason.split()))  # one line


def _skipped(item: Item, reason: str) -> Outcome:
    return Outcome(item.key, "skipped", reason)
