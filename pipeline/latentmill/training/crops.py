"""Random crops of a source's items, loaded while training runs.

The crops of a step are a pure function of the seed, the step and the rank, so that a resumed run
needs no state: it continues with the next step.
"""

from __future__ import annotations

import contextlib
import math
import threading
from collections import OrderedDict
from collections.abc import Generator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from latentmill.audio import open_audio, prepare, probe
from latentmill.errors import ItemError, SourceError
from latentmill.record import FloatArray
from latentmill.sources.base import Item, Segment, Source, known_seconds
from latentmill.sources.reading import UnitReader
from latentmill.storage.threads import map_in_threads
from latentmill.text.log import get_logger
from latentmill.training.linearity import Numbers, random_numbers

# Shorter items are loaded whole and cached. Of longer ones only the crop is decoded, but all bytes
# of a remote recording, a tar member or the row group of a table are read for each crop.
WHOLE_SECONDS = 60.0
CACHE_BYTES = 512 << 20
QUIET = 10 ** (-60 / 20)  # RMS below which another crop is drawn
DRAWS = 16  # crops that are drawn until one can be loaded and is not silent
PREFETCH = 3  # batches in memory, with the one that is trained on; more if there are more threads
_STREAM = 1  # of the random numbers; 0 is that of the augmentation
_LEVELS = 3  # the same, for their levels

_log = get_logger("training")


@dataclass(frozen=True)
class AudioBatch:
    """Crops `[B, C, T]`, and the key and start of each, for messages."""

    audio: Tensor
    names: tuple[str, ...]


class Crops:
    """Draws crops of `samples` samples, uniformly from all items.

    Items shorter than a crop are padded with zeros. If an item cannot be loaded, another one is
    drawn instead. It is reported once, but tried again whenever it is drawn: the error may have
    been transient, and crops do not depend on those of earlier steps. Silent crops are drawn again.
    """

    def __init__(
        self,
        items: Sequence[Item],
        *,
        sample_rate: int,
        channels: int,
        samples: int,
        batch_size: int,
        quieter_db: float = 0.0,
        seed: int = 0,
        rank: int = 0,
    ) -> None:
        self._items = items
        self._quieter_db = quieter_db
        self._rate, self._channels, self._samples = sample_rate, channels, samples
        self._batch_size, self._seed, self._rank = batch_size, seed, rank
        self._lock = threading.Lock()  # guards what follows
        self._lengths: dict[str, float | None] = {}
        self._rough: set[str] = set()  # items whose length is approximate
        self._ends: dict[str, float] = {}  # measured lengths of some of them, in seconds
        self._whole: OrderedDict[str, FloatArray] = OrderedDict()
        self._size = 0
        self._reported: set[str] = set()
        self._versions: dict[str, tuple[int, str]] = {}  # of tars and tables

    def batch(self, step: int) -> AudioBatch:
        """The crops of a step.

        Raises:
            SourceError: No crop of the step can be loaded, or all are silent.
        """
        count = self._batch_size
        draws = random_numbers(self._seed, step, self._rank, 2 * DRAWS * count, _STREAM)
        drawn = [self._draw(numbers) for numbers in draws.reshape(count, DRAWS, 2)]
        if not any(_audible(crop) for crop, _ in drawn):
            raise SourceError(
                f"all crops of step {step} are silent (below -60 dBFS): check the audio of SOURCE, "
                "or raise batch_size or crop_seconds."
            )
        levels = self._quieter_db * random_numbers(self._seed, step, self._rank, count, _LEVELS)
        gains = (10 ** (-levels / 20)).astype(np.float32)[:, None, None]
        audio = torch.from_numpy(gains * np.stack([crop for crop, _ in drawn]))
        return AudioBatch(audio, tuple(name for _, name in drawn))

    def batches(self, start: int, end: int, threads: int) -> Generator[AudioBatch]:
        """The batches of steps `start` to `end` - 1, loaded ahead by threads, each a batch."""
        steps, prefetch = range(start, end), max(PREFETCH, threads + 1)
        return map_in_threads(self.batch, steps, threads=threads, prefetch=prefetch)

    def _draw(self, numbers: Numbers) -> tuple[FloatArray, str]:
        """The first crop that loads and is not silent, else the first that loads."""
        silent: tuple[FloatArray, str] | None = None
        failure = ""
        for which, where in numbers:
            item = self._items[int(which * len(self._items))]
            try:
                crop, start = self._crop(item, where)
            except ItemError as error:
                failure = f"{item.key} ({error})"
                self._report(item, str(error))
                continue
            found = crop, f"{item.key} at {start:.2f} s"
            if _audible(crop):
                return found
            silent = silent or found
        if silent is None:
            raise SourceError(
                f"{DRAWS} items in a row cannot be loaded, the last {failure}: check SOURCE."
            )
        return silent

    def _crop(self, item: Item, where: float) -> tuple[FloatArray, float]:
        """A crop, and its start in seconds."""
        audio, length = self._known(item)
        if audio is not None:
            first = int(where * max(1, audio.shape[1] - self._samples + 1))
            crop, start = audio[:, first : first + self._samples], first / self._rate
        elif item.key in self._rough:
            crop, start = self._rough_crop(item, length, where)
        else:
            start = self._start(length, where)
            crop = self._part(item, start, length)
        missing = self._samples - crop.shape[1]
        crop = np.pad(crop, ((0, 0), (0, missing))) if missing > 0 else np.ascontiguousarray(crop)
        if not np.isfinite(crop).all():
            raise ItemError("it contains NaN or infinite samples")
        return crop, start

    def _rough_crop(self, item: Item, length: float, where: float) -> tuple[FloatArray, float]:
        """A crop of a long item of about this length, and its start in seconds.

        A crop that would pass the end is drawn from the measured length instead. Other crops are
        not, so that they do not depend on what was measured before.
        """
        start = self._start(length, where)
        end = start + self._samples / self._rate
        if end < self._ends.get(item.key, math.inf) + 1e-3:  # lengths are rounded to samples
            with contextlib.suppress(ItemError):  # the crop starts after the end
                crop = self._part(item, start, length)
                if crop.shape[1] == self._samples:
                    return crop, start
        length = self._end(item)
        start = self._start(length, where)
        return self._part(item, start, length), start

    def _start(self, length: float, where: float) -> float:
        """Start in seconds of a crop of an item of this length."""
        return where * max(0.0, length - self._samples / self._rate)

    def _part(self, item: Item, start: float, length: float) -> FloatArray:
        """A crop of an item of this length; the end is never passed."""
        left = min(self._samples / self._rate + 0.1, length - start)
        return self._load(item, start, left)[:, : self._samples]

    def _known(self, item: Item) -> tuple[FloatArray | None, float]:
        """The whole audio of a short item, or the length of a long one in seconds."""
        length = self._length(item)
        if length is None or length <= WHOLE_SECONDS:
            return self._cached(item), 0.0
        return None, length

    def _length(self, item: Item) -> float | None:
        """The length in seconds, perhaps approximate; None if only loading it tells."""
        known = known_seconds(item)
        if known is not None and (item.segment is not None or known <= WHOLE_SECONDS):
            return known
        with self._lock:
            if item.key in self._lengths:
                return self._lengths[item.key]
        with self._reader(item) as reader, reader.open(item) as media:
            info = probe(media)
        counted = None if info.num_samples is None else info.num_samples / info.sample_rate
        seconds = info.rough_seconds if counted is None else counted
        if seconds is not None and item.segment is not None:
            seconds -= item.segment.start
        if known is not None:  # in a manifest, perhaps rounded: it must not exceed the recording
            seconds = known if counted is None else min(known, counted)
        with self._lock:
            self._lengths[item.key] = seconds
            if counted is None or not info.exact:
                self._rough.add(item.key)
        return seconds

    def _end(self, item: Item) -> float:
        """The length in seconds, measured by loading the whole item."""
        with self._lock:
            if item.key in self._ends:
                return self._ends[item.key]
        part = item.segment or Segment(0.0)
        with self._reader(item) as reader, reader.open(item) as media:
            stream = open_audio(
                media, start=part.start, duration=part.duration, allow_truncated=True
            )
            end = sum(block.shape[1] for block in stream.blocks()) / stream.sample_rate
        with self._lock:
            self._ends[item.key] = end
        return end

    def _cached(self, item: Item) -> FloatArray:
        with self._lock:
            if item.key in self._whole:
                self._whole.move_to_end(item.key)
                return self._whole[item.key]
        audio = self._load(item)
        if audio.nbytes > CACHE_BYTES:
            return audio
        with self._lock:
            if item.key not in self._whole:
                self._whole[item.key] = audio
                self._size += audio.nbytes
            while self._size > CACHE_BYTES:
                self._size -= self._whole.popitem(last=False)[1].nbytes
        return audio

    def _load(self, item: Item, start: float = 0.0, seconds: float | None = None) -> FloatArray:
        """Audio `[C, T]` of an item, from `start` seconds on."""
        part = item.segment or Segment(0.0)
        duration = part.duration if seconds is None else seconds
        with self._reader(item) as reader, reader.open(item) as media:
            stream = open_audio(
                media, start=part.start + start, duration=duration, allow_truncated=True
            )
            waveform = prepare(stream, sample_rate=self._rate, channels=self._channels)
            return np.concatenate(list(waveform.blocks()), axis=1)

    def _reader(self, item: Item) -> UnitReader:
        return UnitReader([item], allow_changed=True, versions=self._versions)

    def _report(self, item: Item, reason: str) -> None:
        with self._lock:
            new = item.key not in self._reported
            self._reported.add(item.key)
        if new:
            _log.warning("cannot load %s (%s): other items are drawn instead", item.key, reason)


def list_items(source: Source) -> list[Item]:
    """The items of a source in the order of their keys; SourceError if there is none."""
    items = sorted(source.items(), key=lambda item: item.key)
    if not items:
        raise SourceError(f"Source {source.uri} contains no audio: check the path.")
    return items


def _audible(crop: FloatArray) -> bool:
    return float(np.sqrt(np.mean(np.square(crop, dtype=np.float64)))) >= QUIET
