"""Loads a long recording in pieces, in several threads, with the samples of loading it whole.

A piece starts at a fixed position of a lossless file. The resampler (soxr) filters blocks of fixed
lengths with FFTs, so a sample's last bits depend on its position in such a block: a resampler that
starts in the middle of a recording gives equal samples only if it starts at a multiple of
`restart_step`, and after its first block. Each piece also has the last samples before it, which are
compared with the piece before. If anything differs or fails, the recording is loaded again whole,
without the samples that were already yielded, so its errors are those of loading it whole.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol, TypeAlias

import numpy as np
import soxr

from latentmill.audio.stream import BLOCK, AudioStream, DecodeError
from latentmill.errors import ItemError
from latentmill.record import FloatArray

PIECE_BYTES = 8 << 20  # of the converted samples
QUALITY = "HQ"  # of soxr

_LEAD = 8192  # source samples before a piece in which the resampler settles; `_continues` checks it
_CHECKED = 512  # samples before a piece that are compared with the piece before
_FEWEST = 3  # pieces of a recording that is worth splitting
_ARRIVALS = 6  # outputs of the resampler after which the length of its blocks is known
_LONGEST_STEP = 1 << 20

Piece: TypeAlias = list[FloatArray]  # blocks `[n, C]`; the first one has the samples before


class Helpers(Protocol):
    """Threads that may have time to load pieces."""

    prefetch: int
    """Pieces that a recording may offer before it needs them."""

    def offer(self, load: Callable[[], Piece]) -> Future[Piece] | None:
        """Let an idle thread call `load`; None if too many pieces are waiting already."""
        ...

    def take(self, future: Future[Piece]) -> Piece | None:
        """The piece of `offer`, waiting for it; None if no thread has begun to load it."""
        ...

    def withdraw(self, future: Future[Piece]) -> None:
        """The piece is not needed."""
        ...


@dataclass(frozen=True)
class Grid:
    """Where the pieces of a recording start: source samples to load, and converted samples."""

    rates: tuple[int, int]  # of the source and the model, Hz
    step: int  # source samples from piece to piece
    total: int  # source samples
    channels: int  # of the converted samples

    @property
    def count(self) -> int:
        return max(1, (self.total - 2 * _LEAD) // self.step + 1)

    def restart(self, number: int) -> int:
        """The source sample from which a piece is loaded."""
        at = number * self.step
        return at if number == 0 or self.resamples else at - _CHECKED

    def start(self, number: int) -> int:
        """The converted sample at which a piece starts."""
        at = number * self.step
        return self.converted(at + _LEAD if number and self.resamples else at)

    def stop(self, number: int) -> int:
        return self.start(number + 1) if number + 1 < self.count else self.converted(self.total)

    def converted(self, samples: int) -> int:
        in_rate, out_rate = self.rates
        return -(-samples * out_rate // in_rate)

    @property
    def resamples(self) -> bool:
        return self.rates[0] != self.rates[1]


def grid_of(stream: AudioStream, out_rate: int, channels: int) -> Grid | None:
    """The pieces of a recording with `channels` after conversion; None if it is not split."""
    in_rate, total = stream.sample_rate, stream.num_samples
    least = PIECE_BYTES // (4 * channels) * in_rate // out_rate
    if total is None or total < _FEWEST * least or not stream.divisible:
        return None
    unit = BLOCK if in_rate == out_rate else restart_step(in_rate, out_rate)
    if unit is None:
        return None
    grid = Grid((in_rate, out_rate), -(-least // unit) * unit, total, channels)
    return grid if grid.count >= _FEWEST else None


class _DifferentError(Exception):
    """A piece failed, is too short, or does not continue the one before."""


_FAULTS = (ItemError, DecodeError, OSError, _DifferentError)


class _Cursor:
    """Converted samples from a position on."""

    def __init__(self, blocks: Iterator[FloatArray], at: int) -> None:
        self.at = at
        self._blocks = blocks
        self._rest: FloatArray | None = None

    def until(self, stop: int | None) -> Iterator[FloatArray]:
        """Yield blocks `[n, C]` up to `stop`; fewer if the recording ends before."""
        while stop is None or self.at < stop:
            block = next(self._blocks, None) if self._rest is None else self._rest
            if block is None:
                return
            keep = len(block) if stop is None else stop - self.at
            self._rest = block[keep:] if keep < len(block) else None
            self.at += len(block[:keep])
            yield block[:keep]

    def close(self) -> None:
        self._blocks.close()  # type: ignore[attr-defined]  # closes the file


class PieceLoader:
    """Loads a recording in pieces. `convert` yields converted blocks `[n, C]` of a stream."""

    def __init__(
        self,
        stream: AudioStream,
        grid: Grid,
        convert: Callable[[AudioStream], Iterator[FloatArray]],
        helpers: Helpers,
    ) -> None:
        self._stream, self._grid, self._convert, self._helpers = stream, grid, convert, helpers
        self._offered: deque[tuple[int, Future[Piece]]] = deque()
        self._next = 1  # the first piece that was not offered
        self._cursor: _Cursor | None = _Cursor(convert(stream), 0)
        self._whole = True  # all pieces so far came from this cursor
        # The last samples that were yielded.
        self._tail: FloatArray = np.empty((0, grid.channels), np.float32)

    def blocks(self) -> Generator[FloatArray, None, None]:
        """Yield the converted blocks `[n, C]` of the recording.

        Raises:
            ItemError: See `AudioStream.blocks`.
        """
        done = 0
        try:
            for number in range(self._grid.count):
                for block in self._piece(number):
                    done += len(block)
                    self._tail = _joined([self._tail, block[-_CHECKED:]])[-_CHECKED:]
                    yield block
                if done != self._grid.stop(number):
                    if self._whole:  # truncated, which is allowed
                        return
                    raise _DifferentError
        except _FAULTS:
            if self._whole:
                raise
        else:
            self._stream.loaded = self._grid.total
            return
        finally:
            self._close()
        stream = self._stream.part(0)
        with contextlib.closing(_Cursor(self._convert(stream), 0)) as cursor:
            for _ in cursor.until(done):
                pass
            yield from cursor.until(None)
        self._stream.loaded = stream.loaded

    def _piece(self, number: int) -> Iterator[FloatArray]:
        self._offer(number)
        if self._offered and self._offered[0][0] == number:
            try:
                piece = self._helpers.take(self._offered.popleft()[1])
            except _FAULTS as error:
                self._leave_cursor()
                raise _DifferentError from error
            if piece is not None:
                self._leave_cursor()
                self._compare(piece[0])
                yield from piece[1:]
                return
        if self._cursor is None:
            self._cursor = self._open(number)
            self._compare(_joined(list(self._cursor.until(self._grid.start(number)))))
        last = number + 1 == self._grid.count
        yield from self._cursor.until(None if last else self._grid.stop(number))

    def _offer(self, number: int) -> None:
        """Offer the next pieces to other threads."""
        self._next = max(self._next, number + 1)
        while self._next < min(self._grid.count, number + 1 + self._helpers.prefetch):
            future = self._helpers.offer(lambda piece=self._next: self._load(piece))  # type: ignore[misc]
            if future is None:
                return
            self._offered.append((self._next, future))
            self._next += 1

    def _load(self, number: int) -> Piece:
        """Load a piece, in any thread."""
        with contextlib.closing(self._open(number)) as cursor:
            before = _joined(list(cursor.until(self._grid.start(number))))
            return [before, *cursor.until(self._grid.stop(number))]

    def _open(self, number: int) -> _Cursor:
        restart = self._grid.restart(number)
        blocks = self._convert(self._stream.part(restart))
        return _Cursor(blocks, self._grid.converted(restart))

    def _compare(self, before: FloatArray) -> None:
        before = before[-_CHECKED:]
        count = min(len(before), len(self._tail))
        if not count or not np.array_equal(before[-count:], self._tail[-count:]):
            raise _DifferentError

    def _leave_cursor(self) -> None:
        self._whole = False
        if self._cursor is not None:
            self._cursor.close()
            self._cursor = None

    def _close(self) -> None:
        for _, future in self._offered:
            self._helpers.withdraw(future)
        self._offered.clear()
        if self._cursor is not None:
            self._cursor.close()


def _joined(blocks: list[FloatArray]) -> FloatArray:
    return np.concatenate(blocks) if blocks else np.empty((0, 0), np.float32)


@lru_cache(maxsize=64)
def restart_step(in_rate: int, out_rate: int) -> int | None:
    """Source samples at whose multiples a new resampler continues with equal samples.

    The lengths of the resampler's blocks are measured, because they depend on the version of soxr
    and on the processor. The result is checked with noise; None if there is no such step.
    """
    if _LEAD * out_rate // in_rate < 2 * _CHECKED:
        return None  # too few samples before a piece to settle and to compare
    common = math.gcd(in_rate, out_rate)
    whole_in, whole_out = in_rate // common, out_rate // common
    resampler = _resampler(in_rate, out_rate)
    zero = np.zeros((1, 1), np.float32)
    pushed = 0
    arrivals: list[int] = []
    counts: list[int] = []
    while len(arrivals) < _ARRIVALS and pushed < _LONGEST_STEP >> 3:
        count = len(resampler.resample_chunk(zero, False))
        pushed += 1
        if count:
            arrivals.append(pushed)
            counts.append(count)
    steps = {b - a for a, b in itertools.pairwise(arrivals[1:])}
    if len(steps) == 1:
        step = math.lcm(whole_in, steps.pop())
    elif len(set(counts[1:])) == 1:
        step = math.lcm(whole_out, counts[-1]) // whole_out * whole_in
    else:
        return None
    return step if step <= _LONGEST_STEP and _continues(in_rate, out_rate, step) else None


def _continues(in_rate: int, out_rate: int, step: int) -> bool:
    noise = np.random.default_rng(0).uniform(-1, 1, (step + 8 * _LEAD, 1)).astype(np.float32)
    whole = _resampler(in_rate, out_rate).resample_chunk(noise, False)
    part = _resampler(in_rate, out_rate).resample_chunk(noise[step:], False)
    start, settled = step * out_rate // in_rate, -(-_LEAD * out_rate // in_rate) - _CHECKED
    return len(part) > 2 * settled and np.array_equal(whole[start:][settled:], part[settled:])


def _resampler(in_rate: int, out_rate: int) -> soxr.ResampleStream:
    return soxr.ResampleStream(in_rate, out_rate, 1, "float32", QUALITY)
