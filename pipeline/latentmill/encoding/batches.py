"""Packing chunks of many items into batches of one length, and how long these batches will be."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from latentmill.encoding.chunks import Chunk, Chunking
from latentmill.encoding.lanes import LANES, PACKING, in_turn, lanes_of, reading_order
from latentmill.models.base import ModelSpec
from latentmill.record import FloatArray
from latentmill.sources.base import Item

MAX_ROWS = 1024  # of a batch of very short chunks; kernels limit the size of a batch
LONG_BATCH_SECONDS = 50.0  # audio in a batch from which a fast GPU works at its full speed


@dataclass(frozen=True)
class Batch:
    """Chunks of one length for one forward pass. `owners` has the item number of each chunk."""

    owners: tuple[int, ...]
    chunks: tuple[Chunk, ...]

    @property
    def shape(self) -> tuple[int, int, int]:
        """The shape `[B, C, T]` of its audio."""
        channels, samples = self.chunks[0].audio.shape
        return len(self.chunks), channels, samples

    def audio(self, out: FloatArray | None = None) -> FloatArray:
        """The batch as an array `[B, C, T]`, in `out` if that is given."""
        return np.stack([chunk.audio for chunk in self.chunks], out=out)


class Packer:
    """Packs chunks of many items into full batches of one length.

    A full batch has as many samples as `batch_size` chunks of full length, whatever the length of
    its chunks is. The batches depend on the order of the chunks alone, never on time, so that they
    are the same on every worker. A chunk waits for others of its length until the samples of four
    full batches have passed, because finished items have to wait for the item that it belongs to.
    With `stitch: state` a chunk is in a later batch than the one before it in its item, and at most
    `LANES` chunks wait for which a state is kept.
    """

    def __init__(self, chunking: Chunking, batch_size: int, packing: int = PACKING) -> None:
        self._budget = chunking.samples * batch_size
        self._full = chunking.samples
        self._in_sequence = chunking.stitch == "state"
        self._max_batch = MAX_ROWS if packing >= 3 else max(batch_size, 16)
        self._bins: dict[int, list[tuple[int, Chunk]]] = {}  # by length
        self._begun: dict[int, int] = {}  # samples seen when each bin was begun
        self._continuing: dict[int, int] = {}  # length of waiting chunks for which a state is kept
        self._seen = 0

    def add(self, owner: int, chunk: Chunk) -> Iterator[Batch]:
        """Add a chunk, and yield the batches that are full or have waited too long."""
        length = chunk.audio.shape[1]
        if self._in_sequence and chunk.frame:
            if any(owner == other for other, _ in self._bins.get(self._full, ())):
                yield self._take(self._full)
            if len(self._continuing) == LANES:
                yield self._take(next(iter(self._continuing.values())))
            self._continuing[owner] = length
        waiting = self._bins.setdefault(length, [])
        self._begun.setdefault(length, self._seen)
        waiting.append((owner, chunk))
        self._seen += length
        if len(waiting) >= min(self._max_batch, max(1, self._budget // length)):
            yield self._take(length)
        horizon = self._seen - 4 * self._budget
        for overdue in [other for other, begun in self._begun.items() if begun < horizon]:
            yield self._take(overdue)

    def flush(self) -> Iterator[Batch]:
        """Yield the remaining chunks as batches."""
        while self._bins:
            yield self._take(next(iter(self._bins)))

    def _take(self, length: int) -> Batch:
        taken = self._bins.pop(length)
        del self._begun[length]
        for owner, _ in taken:
            self._continuing.pop(owner, None)
        return Batch(tuple(o for o, _ in taken), tuple(c for _, c in taken))


def expected_batches(
    items: Sequence[Item],
    seconds_of: Callable[[Item], float],
    spec: ModelSpec,
    chunking: Chunking,
    batch_size: int,
    packing: int = PACKING,
) -> Iterator[tuple[int, int]]:
    """The batches of a unit, as (chunks, samples of a chunk), from its planned lengths.

    They differ from the real ones only if lengths are estimated, or if items fail or are skipped.
    """
    packer = Packer(chunking, batch_size, packing)
    silence = np.zeros((1, chunking.samples), np.float32)

    def events(lane: Sequence[tuple[int, Item]]) -> Iterator[tuple[int, Chunk] | None]:
        for number, item in lane:
            yield None  # the item is opened
            samples = round(seconds_of(item) * spec.sample_rate)
            for index, length in enumerate(chunk_lengths(spec, chunking, samples)):
                yield number, Chunk(index, silence[:, :length])
            yield None  # its audio ends

    def batches() -> Iterator[Batch]:
        for event in in_turn([events(lane) for lane in lanes_of(items, packing)]):
            if event is not None:
                yield from packer.add(*event)
        yield from packer.flush()

    items = reading_order(items, packing)
    for batch in batches():
        yield len(batch.chunks), batch.chunks[0].audio.shape[1]


def chunk_lengths(spec: ModelSpec, chunking: Chunking, samples: int) -> Iterator[int]:
    """The lengths of the chunks that a `Chunker` makes of an item."""
    size, step, seen = chunking.samples, chunking.step, chunking.model_samples(spec)
    complete = 0 if samples < size else (samples - size) // step + 1
    for _ in range(complete):
        yield seen
    if complete == 0 and spec.padded(samples) <= size:
        yield spec.padded(samples)
        return
    covered = (complete - 1) * step + size
    ends_short = chunking.ends_short(spec)
    if chunking.stitch == "none" or ends_short:
        if samples > covered:
            yield spec.padded(samples - complete * step) if ends_short else seen
    elif spec.samples(spec.frames(spec.padded(samples))) > covered:
        yield seen
