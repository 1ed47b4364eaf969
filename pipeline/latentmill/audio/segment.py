"""Loads a part of a recording, exact to the sample."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator

from latentmill.audio.stream import AudioInfo, DecodeError, Decoder, DivisibleDecoder
from latentmill.errors import ItemError
from latentmill.record import FloatArray

TOLERANCE = 0.05
"""Seconds that a part may exceed the recording's end, because manifests round their numbers."""


class SegmentDecoder:
    """A part of another decoder's samples: from `start` for `duration` seconds, or to the end.

    The part has the samples from round(start * rate) to before round((start + duration) * rate),
    with times to the nanosecond, so consecutive parts neither share nor lose samples. Raises
    ItemError if the recording is known to end before the part.
    """

    def __init__(self, decoder: Decoder, info: AudioInfo, start: float, duration: float | None):
        rate, total = info.sample_rate, info.num_samples if info.exact else None
        first = _sample_at(start, rate)
        last = None if duration is None else _sample_at(start + duration, rate)
        if total is not None:
            if first >= total or (last or 0) - total > TOLERANCE * rate:
                end = "" if duration is None else f" to {start + duration:g}"
                raise ItemError(
                    f"the recording has {total / rate:.3f} s, but the segment is from "
                    f"{start:g}{end} s"
                )
            last = total if last is None else min(last, total)
        if last is not None and last <= first:
            raise ItemError("the segment has no samples")
        self._decoder, self._first, self._last = decoder, first, last
        self._sure = total is not None  # otherwise `blocks` checks the length
        self._slack = round(TOLERANCE * rate)
        known = last is not None and (total is not None or last < (info.num_samples or 0) - rate)
        count = None if last is None else last - first
        self.info = dataclasses.replace(info, num_samples=count, exact=known)

    def blocks(self) -> Iterator[FloatArray]:
        """Yield blocks `[n, C]`; see `Decoder`."""
        at = self._decoder.seek(self._first)
        for block in self._decoder.blocks():
            end = at + len(block)
            if end > self._first:
                wanted = block[max(self._first - at, 0) :]
                yield wanted if self._last is None else wanted[: self._last - max(at, self._first)]
            at = end
            if self._last is not None and at >= self._last:
                return
        if at <= self._first or ((self._last or 0) - at > self._slack and not self._sure):
            rate = self.info.sample_rate
            raise DecodeError(f"the recording ends at {at / rate:.3f} s")

    def seek(self, sample: int) -> int:
        """Return 0: `blocks` already starts at the part."""
        return 0

    @property
    def divisible(self) -> bool:
        """See `DivisibleDecoder`."""
        return isinstance(self._decoder, DivisibleDecoder) and self._decoder.divisible

    def part(self, sample: int) -> SegmentDecoder:
        """A second decoder, which starts at `sample` of this part; see `DivisibleDecoder`."""
        assert isinstance(self._decoder, DivisibleDecoder)
        part = copy.copy(self)
        part._first = self._first + sample
        part._decoder = self._decoder.part(0)
        return part

    def close(self) -> None:
        """Release the decoder."""
        self._decoder.close()


def _sample_at(seconds: float, rate: int) -> int:
    """The sample at a time. The time is rounded first, because sums of decimals are not exact."""
    return round(round(seconds, 9) * rate)
