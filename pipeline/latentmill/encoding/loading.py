"""Loads items and splits them into chunks, for one model or for several at once."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from latentmill.audio import AudioStream, Waveform, open_audio, prepare
from latentmill.audio.pieces import Helpers
from latentmill.encoding.chunks import Chunk, Chunker, Chunking
from latentmill.encoding.lanes import PACKING
from latentmill.encoding.loudness import LevelMeter
from latentmill.errors import ItemError, StorageError
from latentmill.models.base import ModelSpec
from latentmill.models.inference.precision import Precision
from latentmill.record import FloatArray, Outcome, absent_reason
from latentmill.sources.base import Item, Segment
from latentmill.sources.filters import NO_FILTERS, Filters
from latentmill.sources.metadata import read_metadata
from latentmill.sources.reading import UnitReader
from latentmill.storage.remote import own_limits


@dataclass(frozen=True)
class EncodeSettings:
    """Settings for encoding a unit, apart from the model and the chunking."""

    dtype: str = "float16"
    precision: Precision = "float32"
    batch_size: int = 1
    load_threads: int = 2
    allow_truncated: bool = False
    load_timeout: float | None = None  # seconds for loading an item, in addition to its length
    allow_changed: bool = False  # for a retry: accept whole files that were repaired
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

    `refused` has the items that fail without being read, by key, with the reason; `absent` those
    that are skipped without being read. `encoded` has the keys of items that the store has a
    record of: their files must not have changed, and if they cannot be loaded, they keep it.
    """

    spec: ModelSpec
    chunking: Chunking
    settings: EncodeSettings
    refused: Mapping[str, str] = field(default_factory=dict)
    absent: Mapping[str, str] = field(default_factory=dict)
    encoded: Collection[str] = ()

    def read(self, item: Item, reader: UnitReader) -> Iterator[Event]:
        """Yield one item's events in order. The last one is always `Facts` or an `Outcome`."""
        for _, event in read_together([self], item, reader):
            yield event


def read_together(
    loadings: Sequence[Loading], item: Item, reader: UnitReader
) -> Iterator[tuple[int, Event]]:
    """Load an item once for several models; yield the events of each, with its number.

    The first model is that of a store, the others are those of its fields. If the store gets no
    latent of the item, the fields skip it at once, with the reason that `add` gives. If only the
    model of a field cannot take the audio, the item fails in this field alone.
    """
    shares = _Shares([_Share(loading, item) for loading in loadings])
    reason = None
    try:
        yield from _read(shares, item, reader)
    except ItemError as error:
        reason = str(error)
    except StorageError:  # of this machine: the unit is tried again
        raise
    except Exception as error:  # noqa: BLE001  an unexpected error fails the item, not the unit
        reason = _unexpected(error)
    finally:
        reader.release(item)
    if reason is not None:
        yield from shares.each(lambda share: [share.failed(reason)])


def _read(shares: _Shares, item: Item, reader: UnitReader) -> Iterator[tuple[int, Event]]:
    yield from shares.each(_Share.known)
    if shares.ended:
        return
    with own_limits():
        metadata = read_metadata(item)
    yield from shares.each(lambda share: share.described(metadata))
    if shares.ended:
        return
    settings = shares.settings
    with reader.open(item) as media:
        part = item.segment or Segment(0.0)
        stream = open_audio(
            media,
            start=part.start,
            duration=part.duration,
            allow_truncated=settings.allow_truncated,
            time_limit=settings.load_timeout,
        )
        # Pieces of a recording are converted when they are loaded, so only for one model.
        helpers = reader.helpers if shares.single else None
        yield from shares.each(lambda share: share.begin(stream, helpers))
        if shares.ended:
            return
        content_hash = functools.cache(lambda: reader.content_hash(item, media))
        if shares.single:
            yield from shares.each(lambda share: share.load(content_hash))
            return
        for block in stream.blocks():
            yield from shares.each(functools.partial(_Share.push, block=block))
            if shares.ended:
                return
        yield from shares.each(lambda share: share.finish(content_hash))


class _Share:
    """What one model gets of an item. Ends with `Facts` or an `Outcome`."""

    def __init__(self, loading: Loading, item: Item) -> None:
        self.settings = loading.settings
        self.outcome: Outcome | None = None  # if the model gets no more of the item
        self.ended = False
        self._loading = loading
        self._item = item
        self._opened = False

    def follow(self, events: Iterable[Event]) -> Iterator[Event]:
        """Yield events; after an exception of this model alone, that the item has failed."""
        try:
            for event in events:
                yield from self._noted(event)
        except ItemError as error:
            yield from self._noted(self.failed(str(error)))
        except StorageError:
            raise
        except Exception as error:  # noqa: BLE001  an unexpected error fails the item, not the unit
            yield from self._noted(self.failed(_unexpected(error)))

    def _noted(self, event: Event) -> Iterator[Event]:
        """Yield an event, after `Opened` if it is the first one."""
        if isinstance(event, Outcome):
            self.outcome = event
        self.ended = isinstance(event, Facts | Outcome)
        if not self._opened and not isinstance(event, Opened):
            yield Opened(0)
        self._opened = True
        yield event

    @property
    def lacking(self) -> Outcome | None:
        """Why the store will have no latent of the item; None if it gets or keeps one."""
        found = self.outcome
        fails = found is not None and found.status == "failed"
        return None if fails and self._item.key in self._loading.encoded else found

    def failed(self, reason: str) -> Outcome:
        return Outcome(self._item.key, "failed", " ".join(reason.split()))  # one line

    def skipped(self, reason: str) -> Outcome:
        return Outcome(self._item.key, "skipped", reason)

    def known(self) -> Iterator[Event]:
        """Events of an item that is not read."""
        key, loading = self._item.key, self._loading
        if key in loading.absent:
            yield self.skipped(loading.absent[key])
        elif key in loading.refused:
            yield self.failed(loading.refused[key])

    def described(self, metadata: dict[str, object]) -> Iterator[Event]:
        self._metadata = metadata
        if reason := self.settings.filters.of_source(self._item, metadata):
            yield self.skipped(reason)

    def begin(self, stream: AudioStream, helpers: Helpers | None) -> Iterator[Event]:
        """Prepare for the audio of a recording whose header was read."""
        spec = self._loading.spec
        stated = (stream.num_samples or 0) * spec.sample_rate // stream.sample_rate
        yield Opened(spec.frames(spec.padded(stated)) + 1 if stated else 0)
        if reason := self._unwanted(stream, stated):
            yield self.skipped(reason)
            return
        expected = -(-(stream.num_samples or 0) * spec.sample_rate // stream.sample_rate)
        self._stream = stream
        self._chunker = Chunker(spec, self._loading.chunking, expected)
        self._waveform: Waveform = prepare(
            stream, sample_rate=spec.sample_rate, channels=spec.channels, helpers=helpers
        )
        self._levels = LevelMeter(spec)

    def load(self, content_hash: Callable[[], str]) -> Iterator[Event]:
        """All chunks of the recording, and the facts; if no other model needs it."""
        yield from self._chunks(self._waveform.blocks(contiguous=False))
        yield from self._last(content_hash)

    def push(self, block: FloatArray) -> Iterator[Event]:
        """The chunks that a block `[C, n]` of the recording completes."""
        yield from self._chunks(self._waveform.push(block))

    def finish(self, content_hash: Callable[[], str]) -> Iterator[Event]:
        """The last chunks and the facts, after all blocks were pushed."""
        yield from self._chunks(self._waveform.finish())
        yield from self._last(content_hash)

    def _chunks(self, waveform: Iterable[FloatArray]) -> Iterator[Event]:
        for block in waveform:
            yield from self._chunker.push(block)
            self._levels.push(self._chunker.pushed(block))

    def _last(self, content_hash: Callable[[], str]) -> Iterator[Event]:
        """The last chunks and the facts, or that a filter skips the item."""
        spec, filters = self._loading.spec, self.settings.filters
        stats = self._waveform.stats
        seconds = stats.num_samples / spec.sample_rate
        if reason := filters.of_length(seconds) or filters.of_audio(stats.rms):
            yield self.skipped(reason)
            return
        yield from self._chunker.finish()
        yield Facts(
            source_sample_rate=self._stream.sample_rate,
            source_channels=self._stream.channels,
            content_hash=content_hash(),
            num_samples=stats.num_samples,
            rms=stats.rms,
            peak=stats.peak,
            levels=self._levels.finish(spec.frames(spec.padded(stats.num_samples))),
            metadata=self._metadata,
        )

    def _unwanted(self, stream: AudioStream, stated: int) -> str | None:
        """Why a filter skips an item by its header, or None."""
        filters = self.settings.filters
        reason = filters.of_header(stream.sample_rate, stream.channels)
        if stated and not reason:
            reason = filters.of_length(stated / self._loading.spec.sample_rate)
        return reason


class _Shares:
    """What each of several models gets of an item."""

    def __init__(self, shares: Sequence[_Share]) -> None:
        self._shares = shares

    @property
    def settings(self) -> EncodeSettings:
        """The settings for loading, which all of them have."""
        return self._shares[0].settings

    @property
    def single(self) -> bool:
        """Whether there is one model only."""
        return len(self._shares) == 1

    @property
    def ended(self) -> bool:
        """Whether no model gets more of the item."""
        return all(share.ended for share in self._shares)

    def each(self, step: Callable[[_Share], Iterable[Event]]) -> Iterator[tuple[int, Event]]:
        """Yield the events of a step of each model that has not ended."""
        first = self._shares[0]
        for number, share in enumerate(self._shares):
            if share.ended:
                continue
            events = step(share)
            if share is not first and (lacking := first.lacking):
                events = [share.skipped(absent_reason(lacking.status, lacking.reason))]
            for event in share.follow(events):
                yield number, event


def _unexpected(error: Exception) -> str:
    return f"{type(error).__name__} while reading: {error}"
