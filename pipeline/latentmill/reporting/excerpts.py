"""Short excerpts of records: the original if it can be read, the reconstruction, the latent."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from latentmill.encoding.loudness import busiest_part, loudest_part
from latentmill.errors import ItemError, LatentmillError
from latentmill.record import FloatArray, Latent, Record
from latentmill.store.remote_sources import source_is_near
from latentmill.store.store import LatentStore
from latentmill.store.verify import read_source

_CONTEXT = 8  # frames decoded on either side of an excerpt, at least


@dataclass(frozen=True)
class ExcerptRange:
    """A part of a record: frames of its latent and the samples that they stand for."""

    first_frame: int
    frames: int
    first_sample: int
    samples: int


@dataclass(frozen=True)
class Excerpt:
    """A part of a record as latent and sounds; None for those that are not available.

    Attributes:
        start: Seconds from the start of the record.
        seconds: Length.
        rate: Sample rate of the sounds.
        latent: `[channels, frames]`.
    """

    record: Record
    start: float
    seconds: float
    rate: int
    latent: Latent | None
    original: FloatArray | None
    reconstruction: FloatArray | None

    @property
    def best(self) -> FloatArray | None:
        """The original, or else the reconstruction."""
        return self.reconstruction if self.original is None else self.original


class Excerpts:
    """Reads excerpts of a store's records, and counts why sounds are missing.

    Attributes:
        without_original: Number of records whose source cannot be read, by reason.
        no_model: Why there are no reconstructions; None while there are.
    """

    def __init__(self, store: LatentStore, *, remote_sources: bool = False) -> None:
        self.store = store
        self.without_original: Counter[str] = Counter()
        self.no_model: str | None = None
        self._remote_sources = remote_sources
        self._rate: int = store.info.model["sample_rate"]
        self._hop: int = store.info.model["hop"]
        self._channels: int = store.info.model["channels"]

    def of(self, key: str, seconds: float, *, reconstructed: bool = True) -> Excerpt:
        """The loudest part of a record, up to `seconds` long.

        With `reconstructed=False` the record is decoded only if the original is not available.
        """
        record = self.record(key)
        part = self.part(record, seconds)
        original = self.original(record, part)
        whole = reconstructed or original is None
        return Excerpt(
            record,
            part.first_sample / self._rate,
            part.samples / self._rate,
            self._rate,
            self.latent(key, part) if whole else None,
            original,
            self.reconstruction(key, part) if whole else None,
        )

    def record(self, key: str) -> Record:
        """A record's fields, without its latent."""
        return self.store.without_latent(key)

    def part(self, record: Record, seconds: float) -> ExcerptRange:
        """The loudest part of a record, in frames."""
        return self.common_part([record], self.store.entry(record.key).frames, seconds)

    def common_part(self, records: Sequence[Record], total: int, seconds: float) -> ExcerptRange:
        """The loudest part of a record, or the one in which the most of several are audible.

        The shortest record has `total` frames.
        """
        most = min(record.num_samples for record in records)
        if self.store.chunking.stitch == "none":  # chunks are decoded from the start
            return ExcerptRange(0, total, 0, min(most, round(seconds * self._rate)))
        frames = max(1, min(total, math.ceil(seconds * self._rate / self._hop)))
        levels = (record.levels for record in records)
        chosen = loudest_part if len(records) == 1 else busiest_part
        first = chosen(levels, total, frames, self._rate / self._hop)
        start = first * self._hop
        return ExcerptRange(first, frames, start, max(0, min(frames * self._hop, most - start)))

    def latent(self, key: str, part: ExcerptRange) -> Latent:
        """The frames of a part; of overlapping chunks the first ones."""
        if self.store.chunking.stitch == "none":
            chunks = self.store.source(key)
            needed = 1 + max(0, part.samples - 1) // self.store.chunking.step
            latent: Latent = np.concatenate(
                list(chunks.read(0, min(needed, chunks.shape[0]))), axis=1
            )
            return latent
        return self.store.crop(key, part.first_frame, part.frames)

    def original(self, record: Record, part: ExcerptRange) -> FloatArray | None:
        """The source audio of a part; None if it cannot be read, for a reason that is counted."""
        if not self._remote_sources and not source_is_near(self.store, record):
            self.without_original["at another address"] += 1
            return None
        end = part.first_sample + part.samples
        try:
            audio = read_source(record, self._channels, end)
        except ItemError as error:
            self.without_original[str(error)] += 1
            return None
        return audio[:, part.first_sample : end]

    def reconstruction(self, key: str, part: ExcerptRange) -> FloatArray | None:
        """The decoded latent of a part; None if it cannot be decoded."""
        if not self.can_decode():
            return None
        if self.store.chunking.stitch == "none":
            return self.store.decode_latent(self.store.source(key), part.samples)
        total = self.store.entry(key).frames
        begin, end = self.with_context(part, total)
        return self.cut(self.store.crop(key, begin, end - begin), begin, part)

    def can_decode(self) -> bool:
        """Whether the store's model can decode its values; `no_model` has the reason if not."""
        if self.no_model is None:
            try:
                self.store.decoder()
            except LatentmillError as error:
                self.no_model = str(error)
        return self.no_model is None

    def with_context(self, part: ExcerptRange, total: int) -> tuple[int, int]:
        """The first frame that is decoded for a part, and the end."""
        context = self.store.model().spec.context
        left, right = (context.left, context.right) if context else (0, 0)
        begin = max(0, part.first_frame - max(_CONTEXT, left))
        return begin, min(total, part.first_frame + part.frames + max(_CONTEXT, right))

    def cut(self, latent: Latent, begin: int, part: ExcerptRange) -> FloatArray:
        """Decode frames from `begin` on, and cut the part out."""
        start = part.first_sample - begin * self._hop
        spec = self.store.model().spec
        samples = min(start + part.samples, spec.samples(latent.shape[1]))
        return self.store.decode_latent(latent, samples)[:, start:]
