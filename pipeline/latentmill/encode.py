"""One unit -> latents: decode, chunk, batch, encode, stitch. No Ray, no storage.

Decode threads read the unit's items in order into bounded queues; the calling thread packs their
chunks into full batches, runs the model and puts each item's latents together. The batches depend
on the unit's items alone, so a unit's latents are the same on every worker.
"""

from __future__ import annotations

import itertools
import queue
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch

from latentmill.audio import open_audio, prepare
from latentmill.chunks import Batch, Chunk, Chunker, Chunking, Packer, Stitcher
from latentmill.errors import ItemError
from latentmill.levels import LevelMeter
from latentmill.meter import Meter
from latentmill.models.base import Autoencoder, ModelSpec
from latentmill.models.compiled import uncompiled
from latentmill.models.feed import Array, Feed
from latentmill.models.precision import Precision, numeric_mode
from latentmill.record import DTYPES, Outcome, Record
from latentmill.remote import redact
from latentmill.sources.address import address_of
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
    decode_threads: int = 2
    allow_truncated: bool = False
    decode_timeout: float | None = None  # seconds an item may take, beyond its length
    allow_changed: bool = False  # for a retry: files that were mended since they were planned
    filters: Filters = NO_FILTERS


@dataclass(frozen=True)
class _Opened:
    """An item's header was read: how many latent frames it promises (0 if it does not say)."""

    frames: int


@dataclass(frozen=True)
class _Facts:
    """What is known of an item once its audio is read to the end."""

    source_sample_rate: int
    source_channels: int
    content_hash: str
    num_samples: int
    rms: float
    peak: float
    levels: bytes
    metadata: dict[str, object]


_Event = _Opened | Chunk | _Facts | Outcome


@dataclass
class _Job:
    """An item on its way through the unit."""

    index: int
    item: Item
    stitcher: Stitcher
    expected: int = 0  # chunks packed
    arrived: int = 0  # chunks that came back from the model
    facts: _Facts | None = None
    outcome: Outcome | None = None


class UnitEncoder:
    """Encodes units with one model. One unit at a time; not thread-safe."""

    def __init__(
        self,
        model: Autoencoder,
        chunking: Chunking,
        settings: EncodeSettings,
        meter: Meter | None = None,
        device: str = "cpu",
    ) -> None:
        self._model = model
        self._device = device
        self._feed = Feed(model, device, settings.precision)
        self._queued: deque[Batch] = deque()  # in the feed
        self._chunking = chunking
        self._settings = settings
        self.meter = meter or Meter()

    def encode(self, audio: AudioStream) -> Iterator[Outcome]:
        """Encode a unit's audio, as `AudioStream` gives it; outcomes come in the items' order."""
        packer = Packer(self._chunking, self._settings.batch_size)
        jobs: deque[_Job] = deque()
        by_index: dict[int, _Job] = {}
        for index, item, event in audio:
            if isinstance(event, _Opened):
                stitcher = Stitcher(self._chunking, DTYPES[self._settings.dtype], event.frames)
                jobs.append(_Job(index, item, stitcher))
                by_index[index] = jobs[-1]
            elif isinstance(event, Chunk):
                by_index[index].expected += 1
                for batch in packer.add(index, event):
                    self._run(batch, by_index)
            elif isinstance(event, _Facts):
                by_index[index].facts = event
            else:
                by_index[index].outcome = event
            yield from self._done(jobs, by_index)
        for batch in packer.flush():
            self._run(batch, by_index)
        self._collect(self._feed.flush(), by_index)
        yield from self._done(jobs, by_index)
        assert not jobs, "every item of the unit is accounted for"

    def _run(self, batch: Batch, jobs: dict[int, _Job]) -> None:
        audio = batch.audio()  # [B, C, T]
        self._queued.append(batch)
        self._collect(self._feed.push(audio), jobs)
        self.meter.add("audio_seconds", len(audio) * self._new_seconds(audio.shape[2]))

    def _collect(self, finished: Iterator[Array], jobs: dict[int, _Job]) -> None:
        """Hand out the latents that the feed gives."""
        while True:
            start = time.perf_counter()
            latents = next(finished, None)  # [B, D, Z]
            self.meter.add("model_seconds", time.perf_counter() - start)
            if latents is None:
                return
            batch = self._queued.popleft()
            if self._settings.precision != "float32" and not self._fits(latents):
                latents = self._exactly(batch)
            for owner, chunk, latent in zip(batch.owners, batch.chunks, latents, strict=True):
                job = jobs.get(owner)
                if job is not None:  # else it failed after this chunk was packed
                    job.arrived += 1
                    job.stitcher.add(chunk.frame, latent)

    def _fits(self, latents: Array) -> bool:
        """Whether all numbers are finite and in the range of the stored dtype."""
        return bool(np.abs(latents).max() <= np.finfo(DTYPES[self._settings.dtype]).max)

    def _exactly(self, batch: Batch) -> Array:
        """Encode a batch once more, in float32, before what it belongs to may fail."""
        with numeric_mode("float32", self._device):
            latents = uncompiled(self._model).encode(torch.from_numpy(batch.audio()))
        exact: Array = latents.float().cpu().numpy()
        return exact

    def _new_seconds(self, length: int) -> float:
        """Seconds of audio that a chunk adds, without what it shares with the one before."""
        return min(length, self._chunking.step) / self._model.spec.sample_rate

    def _done(self, jobs: deque[_Job], by_index: dict[int, _Job]) -> Iterator[Outcome]:
        """Give the outcomes of the first items, as far as they are complete."""
        while jobs:
            job = jobs[0]
            if job.outcome is None:
                if job.facts is None or job.arrived < job.expected:
                    return
                job.outcome = self._finish(job, job.facts)
            jobs.popleft()
            del by_index[job.index]
            yield job.outcome

    def _finish(self, job: _Job, facts: _Facts) -> Outcome:
        latent = job.stitcher.finish()
        if not job.stitcher.finite:
            return Outcome(job.item.key, "failed", _gate_message(self._settings.dtype))
        spec, metadata = self._model.spec, facts.metadata
        group = job.item.group or metadata.get("group")
        role = job.item.role or metadata.get("role")
        record = Record(
            key=job.item.key,
            latent=latent,
            num_samples=facts.num_samples,
            sample_rate=spec.sample_rate,
            source_uri=redact(address_of(job.item)),
            source_sample_rate=facts.source_sample_rate,
            source_channels=facts.source_channels,
            content_hash=facts.content_hash,
            rms=facts.rms,
            peak=facts.peak,
            levels=facts.levels if latent.ndim == 2 else None,  # chunks overlap
            group=group if isinstance(group, str) else None,
            role=role if isinstance(role, str) else None,
            metadata=metadata,
        )
        return Outcome(job.item.key, "encoded", record=record)


def _gate_message(dtype: str) -> str:
    if dtype == "float16":
        return "the latents hold NaN, or values beyond float16's range (dtype float32 keeps those)"
    return "the latents hold NaN or Inf"


class AudioStream:
    """Reads a unit's items with decode threads, in order, ahead of whoever iterates.

    Reading starts at once. Iterating gives (index, item, event): that the item is opened, its
    chunks, then its facts, or instead the outcome of an item that failed or was skipped.
    Closing it stops the threads, in the middle of a unit too.
    """

    def __init__(
        self,
        items: Sequence[Item],
        spec: ModelSpec,
        chunking: Chunking,
        settings: EncodeSettings,
        meter: Meter,
        refused: Mapping[str, str] | None = None,
    ) -> None:
        """Begin to read; items whose keys are `refused` fail unread, for the reason given."""
        self._items = items
        self._refused = refused or {}
        self._spec = spec
        self._chunking = chunking
        self._settings = settings
        self._meter = meter
        self._reader = UnitReader(items, allow_changed=settings.allow_changed)
        self._stop = threading.Event()
        self._pool = ThreadPoolExecutor(settings.decode_threads, thread_name_prefix="decode")
        self._waiting = iter(enumerate(items))
        self._running: deque[tuple[int, Item, queue.Queue[_Event]]] = deque()
        for _ in range(settings.decode_threads + 1):
            self._submit()

    def __iter__(self) -> Iterator[tuple[int, Item, _Event]]:
        while self._running:
            index, item, events = self._running[0]
            while True:
                start = time.perf_counter()
                event = events.get()
                self._meter.add("wait_seconds", time.perf_counter() - start)
                yield index, item, event
                if isinstance(event, _Facts | Outcome):
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
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._reader.close()

    def _submit(self) -> None:
        for index, item in itertools.islice(self._waiting, 1):
            events: queue.Queue[_Event] = queue.Queue(QUEUE_CHUNKS)
            self._running.append((index, item, events))
            self._pool.submit(self._read, item, events)

    def _read(self, item: Item, events: queue.Queue[_Event]) -> None:
        """Read one item into its queue; whatever happens, the last event ends it."""
        start = time.perf_counter()
        waited = reading = 0.0
        opened = False
        try:
            if item.key in self._refused:
                raise ItemError(self._refused[item.key])
            for event in _events(item, self._reader, self._spec, self._chunking, self._settings):
                if not opened:
                    opened, reading = True, time.perf_counter() - start
                waited += self._put(events, event)
                if self._stop.is_set():
                    return
        except ItemError as error:
            last: Outcome | None = _failed(item, str(error))
        except Exception as error:  # noqa: BLE001  one odd file must not end the unit
            last = _failed(item, f"{type(error).__name__} while reading: {error}")
        else:
            last = None
        if last is not None:
            if not opened:
                waited += self._put(events, _Opened(0))
            waited += self._put(events, last)
        self._meter.add("read_seconds", reading)
        self._meter.add("decode_seconds", time.perf_counter() - start - waited - reading)

    def _put(self, events: queue.Queue[_Event], event: _Event) -> float:
        """Put an event into a bounded queue; gives the seconds that it had to wait."""
        start = time.perf_counter()
        while not self._stop.is_set():
            try:
                events.put(event, timeout=0.2)
            except queue.Full:
                continue
            break
        return time.perf_counter() - start


def _events(
    item: Item,
    reader: UnitReader,
    spec: ModelSpec,
    chunking: Chunking,
    settings: EncodeSettings,
) -> Iterator[_Event]:
    """That the item is opened, its chunks, then its facts; or that it is skipped."""
    filters = settings.filters
    metadata = read_metadata(item)
    if reason := filters.of_source(item, metadata):
        yield from (_Opened(0), _skipped(item, reason))
        return
    chunker = Chunker(spec, chunking)
    with reader.open(item) as media:
        part = item.segment or Segment(0.0)
        stream = open_audio(
            media,
            start=part.start,
            duration=part.duration,
            allow_truncated=settings.allow_truncated,
            time_limit=settings.decode_timeout,
        )
        promised = (stream.num_samples or 0) * spec.sample_rate // stream.sample_rate
        yield _Opened(spec.frames(spec.padded(promised)) + 1 if promised else 0)
        reason = filters.of_header(stream.sample_rate, stream.channels)
        if promised and not reason:
            reason = filters.of_length(promised / spec.sample_rate)
        if reason:
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
        yield _Facts(
            source_sample_rate=stream.sample_rate,
            source_channels=stream.channels,
            content_hash=reader.content_hash(item, media),
            num_samples=stats.num_samples,
            rms=stats.rms,
            peak=stats.peak,
            levels=meter.finish(spec.frames(spec.padded(stats.num_samples))),
            metadata=metadata,
        )


def _failed(item: Item, reason: str) -> Outcome:
    return Outcome(item.key, "failed", " ".join(reason.split()))  # one line


def _skipped(item: Item, reason: str) -> Outcome:
    return Outcome(item.key, "skipped", reason)
