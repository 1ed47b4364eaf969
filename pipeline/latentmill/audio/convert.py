"""Converts audio to a model's rate and channels: downmixes, then resamples, block by block."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import soxr

from latentmill.audio.pieces import QUALITY, Helpers, PieceLoader, grid_of
from latentmill.audio.stream import BLOCK, AudioStream
from latentmill.errors import ItemError
from latentmill.record import FloatArray


@dataclass(frozen=True)
class WaveformStats:
    """Measurements of a waveform.

    Attributes:
        num_samples: Samples per channel at the model's rate.
        source_num_samples: Samples per channel that were loaded.
        rms: Root mean square of the converted signal over all channels.
        peak: Largest magnitude of the converted signal.
    """

    num_samples: int
    source_num_samples: int
    rms: float
    peak: float


class Waveform:
    """A recording at a model's rate and channels. Iterate over `blocks()` once, then read `stats`.

    If a recording is loaded for several models, `push` each of its blocks instead, then `finish`.

    Attributes:
        sample_rate: Hz, the model's.
        channels: Channels, the model's.
    """

    def __init__(
        self,
        stream: AudioStream,
        sample_rate: int,
        channels: int,
        helpers: Helpers | None = None,
    ) -> None:
        self.sample_rate = sample_rate
        self.channels = channels
        self._stream, self._helpers = stream, helpers
        self._pushed: _Pushed | None = None
        self._samples, self._power, self._peak = 0, 0.0, 0.0
        self._finished = False

    @property
    def stats(self) -> WaveformStats:
        """Measurements of the whole signal.

        Raises:
            RuntimeError: `blocks()` is not exhausted.
        """
        if not self._finished:
            raise RuntimeError(
                "the stats are not known before blocks() is exhausted: read all blocks first"
            )
        rms = math.sqrt(self._power / self._samples)
        return WaveformStats(self._samples, self._stream.loaded, rms, self._peak)

    def blocks(self, *, contiguous: bool = True) -> Iterator[FloatArray]:
        """Yield blocks `[C, n]`, float32, n at most `BLOCK`, in total
        ceil(source samples * model rate / source rate).

        The samples are bit-identical however the source is split into blocks, and whether or not it
        is loaded in pieces. With `contiguous=False`, the channels of a block are interleaved in
        memory, which saves a copy if the caller copies them anyway.

        Raises:
            ItemError: See `AudioStream.blocks`.
        """
        for block in map(self._measured, self._blocks()):
            yield np.ascontiguousarray(block) if contiguous else block
        self._finished = True

    def push(self, block: FloatArray) -> Iterator[FloatArray]:
        """Yield what a block `[C, n]` of the recording gives; in total the same as `blocks`.

        The result need not be contiguous.
        """
        if self._pushed is None:
            self._pushed = _Pushed(self._stream, self.sample_rate, self.channels)
        yield from map(self._measured, self._pushed.push(block))

    def finish(self) -> Iterator[FloatArray]:
        """Yield what is left after the last block of the recording."""
        if self._pushed is not None:
            yield from map(self._measured, self._pushed.finish())
        self._finished = True

    def _measured(self, block: FloatArray) -> FloatArray:
        """Measure a converted block `[n, C or 1]`, and return it as `[C, n]`."""
        self._samples += len(block)
        self._power += _energy(block) / block.shape[1]
        self._peak = max(self._peak, float(block.max()), -float(block.min()))
        mono_to_all = self.channels > block.shape[1]
        return np.broadcast_to(block.T, (self.channels, len(block))) if mono_to_all else block.T

    def _blocks(self) -> Iterator[FloatArray]:
        """All converted blocks `[n, C]`; where `stats` are measured does not depend on pieces."""
        stream = self._stream
        channels = min(stream.channels, self.channels)
        grid = grid_of(stream, self.sample_rate, channels) if self._helpers else None
        if grid is not None and self._helpers is not None:
            blocks = PieceLoader(stream, grid, self._converted, self._helpers).blocks()
            with contextlib.closing(blocks):
                yield from _equal_blocks(blocks)
        elif _in_equal_blocks(stream, self.sample_rate):
            yield from _equal_blocks(self._converted(stream))
        else:
            yield from self._converted(stream)

    def _converted(self, stream: AudioStream) -> Iterator[FloatArray]:
        """Downmixed and resampled blocks `[n, C]`; mono has one channel here, to save time."""
        channels = min(stream.channels, self.channels)
        if stream.sample_rate == self.sample_rate:
            yield from self._downmixed(stream)
            return
        resampler = _Resampler(stream.sample_rate, self.sample_rate, channels)
        for block in self._downmixed(stream):
            yield from resampler.push(block)
        yield from resampler.finish()

    def _downmixed(self, stream: AudioStream) -> Iterator[FloatArray]:
        for block in stream.blocks():  # [C, n], transposed in memory
            yield from _downmixed(block, self.channels)


def _downmixed(block: FloatArray, channels: int) -> Iterator[FloatArray]:
    """A block `[C, n]` as parts `[n, C]`, or `[n, 1]` for a model with one channel."""
    mixed = block.T  # [n, C]
    if channels == 1 and len(block) > 1:
        mixed = _mean(block)[:, None]
    for start in range(0, len(mixed), BLOCK):
        yield mixed[start : start + BLOCK]


class _Pushed:
    """Converts a recording whose blocks are pushed, as `Waveform.blocks` without pieces."""

    def __init__(self, stream: AudioStream, sample_rate: int, channels: int) -> None:
        self._channels = channels
        self._resampler: _Resampler | None = None
        if stream.sample_rate != sample_rate:
            kept = min(stream.channels, channels)
            self._resampler = _Resampler(stream.sample_rate, sample_rate, kept)
        self._equal = _EqualBlocks() if _in_equal_blocks(stream, sample_rate) else None

    def push(self, block: FloatArray) -> Iterator[FloatArray]:
        for part in _downmixed(block, self._channels):
            converted = [part] if self._resampler is None else self._resampler.push(part)
            yield from self._regrouped(converted)

    def finish(self) -> Iterator[FloatArray]:
        if self._resampler is not None:
            yield from self._regrouped(self._resampler.finish())
        if self._equal is not None:
            yield from self._equal.finish()

    def _regrouped(self, blocks: Iterable[FloatArray]) -> Iterator[FloatArray]:
        for block in blocks:
            yield from [block] if self._equal is None else self._equal.push(block)


def _in_equal_blocks(stream: AudioStream, sample_rate: int) -> bool:
    """Whether `stats` are measured over blocks of one size, so that pieces do not change them."""
    return stream.sample_rate != sample_rate or stream.divisible


class _EqualBlocks:
    """Regroups samples into blocks `[BLOCK, C]`; the last one is shorter."""

    def __init__(self) -> None:
        self._parts: list[FloatArray] = []
        self._size = 0

    def push(self, block: FloatArray) -> Iterator[FloatArray]:
        rest = block
        while self._size + len(rest) >= BLOCK:
            self._parts.append(rest[: BLOCK - self._size])
            rest = rest[BLOCK - self._size :]
            yield self._parts[0] if len(self._parts) == 1 else np.concatenate(self._parts)
            self._parts, self._size = [], 0
        if len(rest):
            self._parts.append(rest)
            self._size += len(rest)

    def finish(self) -> Iterator[FloatArray]:
        if self._parts:
            yield np.concatenate(self._parts)


def _equal_blocks(blocks: Iterable[FloatArray]) -> Iterator[FloatArray]:
    """The same samples in blocks `[BLOCK, C]`; the last one is shorter."""
    equal = _EqualBlocks()
    for block in blocks:
        yield from equal.push(block)
    yield from equal.finish()


def _mean(block: FloatArray) -> FloatArray:
    """The mean over the channels of `[C, n]`: `[n]`. `np.mean` is several times slower here."""
    total: FloatArray = block[0] + block[1]
    for channel in block[2:]:
        total += channel
    total /= len(block)
    return total


_ROW = 512


def _energy(block: FloatArray) -> float:
    """The sum of all squares, without a copy: short rows in float32, their sums in float64."""
    flat = np.ascontiguousarray(block).reshape(-1)
    whole = len(flat) // _ROW * _ROW
    rows = flat[:whole].reshape(-1, _ROW)
    squares = np.matmul(rows[:, None, :], rows[:, :, None])  # [rows, 1, 1]
    return float(squares.sum(dtype=np.float64)) + float(np.dot(flat[whole:], flat[whole:]))


def prepare(
    stream: AudioStream, *, sample_rate: int, channels: int, helpers: Helpers | None = None
) -> Waveform:
    """Convert a recording to a model's rate and channels while it is loaded.

    Downmix first (mono is the mean of the channels; mono input is copied to all channels), then
    resample with soxr HQ if the rates differ. No gain and no clipping. `helpers` load pieces of
    long lossless recordings.

    Raises:
        ItemError: The number of channels cannot be converted.
    """
    if channels not in (stream.channels, 1) and stream.channels != 1:
        raise ItemError(
            f"it has {stream.channels} channels and the model needs {channels}: "
            "convert it to mono or to the model's channels"
        )
    return Waveform(stream, sample_rate, channels, helpers)


class _Resampler:
    """A streaming resampler (soxr) with exactly ceil(input * out rate / in rate) output samples."""

    def __init__(self, in_rate: int, out_rate: int, channels: int) -> None:
        self._soxr = soxr.ResampleStream(in_rate, out_rate, channels, "float32", QUALITY)
        self._rates = (in_rate, out_rate)
        self._channels = channels
        self._pushed = 0
        self._emitted = 0

    def push(self, block: FloatArray) -> Iterator[FloatArray]:
        """Resample `[n, C]` in pieces, to bound the output at any ratio of rates."""
        in_rate, out_rate = self._rates
        piece = max(1, BLOCK * in_rate // max(in_rate, out_rate))
        self._pushed += len(block)
        for start in range(0, len(block), piece):
            yield from self._run(block[start : start + piece], last=False)

    def finish(self) -> Iterator[FloatArray]:
        """Append silence and flush, because soxr may round the length down."""
        in_rate, out_rate = self._rates
        silence = np.zeros((in_rate // out_rate + 2, self._channels), np.float32)
        yield from self._run(silence, last=True)

    def _run(self, block: FloatArray, *, last: bool) -> Iterator[FloatArray]:
        in_rate, out_rate = self._rates
        output: FloatArray = self._soxr.resample_chunk(np.ascontiguousarray(block), last)  # [n, C]
        total = -(-self._pushed * out_rate // in_rate)
        output = output[: total - self._emitted]
        self._emitted += len(output)
        assert not last or self._emitted == total
        for start in range(0, len(output), BLOCK):
            yield output[start : start + BLOCK]
