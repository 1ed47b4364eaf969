"""A recording as a stream of blocks, checked against the length in its header."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np

from latentmill.audio import bitstreams
from latentmill.audio.media import MediaFile
from latentmill.errors import ItemError
from latentmill.record import FloatArray
from latentmill.storage.closeable import Closeable

BLOCK = 1 << 17
"""Maximum samples per channel of a block: 1 MiB of stereo."""

_LONGEST_GAP = 1 << 28
"""Maximum samples of a gap: an hour and a half at 48 kHz."""

_INTEGERS = ("pcm_s8", "pcm_u8", "pcm_16", "pcm_24", "pcm_32")
"""Codecs of libsndfile, FLAC among them, whose samples cannot be NaN or infinite."""

KEEP_HINT = "(--allow-truncated keeps the readable part)"


@dataclass(frozen=True)
class AudioInfo:
    """Properties of a recording that are known before it is loaded.

    Attributes:
        sample_rate: Hz.
        channels: Channels.
        num_samples: Samples per channel according to the file's headers; None if unknown.
        format: Container, as returned by `sniff`.
        codec: Codec or sample format, such as `pcm_16`, `vorbis`, `aac`.
        decoder: `soundfile` or `pyav`.
        exact: Whether `num_samples` is exact, so that fewer samples mean that some are missing.
            Headers of MP4 are rounded, and those of Ogg Opus may count from any number.
        rough_seconds: Approximate length according to the container, for example from a bit rate.
    """

    sample_rate: int
    channels: int
    num_samples: int | None
    format: str
    codec: str
    decoder: str
    exact: bool = True
    rough_seconds: float | None = None

    def check(self) -> None:
        """Check the header.

        Raises:
            ItemError: The rate or the number of channels is out of range.
        """
        if not 100 <= self.sample_rate <= 1_000_000:
            raise ItemError(f"invalid sample rate {self.sample_rate} Hz: not from 100 to 1000000")
        if not 1 <= self.channels <= 64:
            raise ItemError(f"invalid number of channels {self.channels}: not from 1 to 64")


class DecodeError(Exception):
    """A decoder failed. Internal: `AudioStream` converts it to an ItemError or ends."""


class Decoder(Protocol):
    """A file that is open in a decoder."""

    info: AudioInfo
    """Properties according to the header."""

    def blocks(self) -> Iterator[FloatArray]:
        """Yield blocks `[n, C]`, n at most about `BLOCK`, each a new array.

        Raises:
            DecodeError: At a fault, after all samples before it.
        """
        ...

    def seek(self, sample: int) -> int:
        """Before `blocks()`: start at `sample` or an earlier one; return the number of the start.

        Raises:
            DecodeError: The file cannot be read there.
        """
        ...

    def close(self) -> None:
        """Release the decoder; the file stays open."""
        ...


@runtime_checkable
class DivisibleDecoder(Decoder, Protocol):
    """A decoder of a file of which any part can be decoded alone."""

    @property
    def divisible(self) -> bool:
        """Whether a part has exactly the samples that it has in the whole file."""
        ...

    def part(self, sample: int) -> Decoder:
        """A second decoder of the file, which starts at `sample`. Thread-safe.

        Raises:
            DecodeError: The file cannot be read there.
        """
        ...


def _nothing() -> None:
    pass


class AudioStream(Closeable):
    """An open recording. Iterate over `blocks()` once to load its samples.

    Attributes:
        info: The recording's header; for a part of a recording, `num_samples` is the part's.
        loaded: Samples per channel that were loaded so far.
        on_block: Called after each block that the decoder has loaded.
    """

    def __init__(
        self,
        decoder: Decoder,
        *,
        repaired: MediaFile | None = None,
        allow_truncated: bool = False,
        time_limit: float | None = None,
    ) -> None:
        self.info = decoder.info
        self.loaded = 0
        self.on_block: Callable[[], object] = _nothing
        self._time_limit = time_limit
        self._decoder, self._repaired = decoder, repaired
        self._allow_truncated = allow_truncated

    @property
    def sample_rate(self) -> int:
        """Hz."""
        return self.info.sample_rate

    @property
    def channels(self) -> int:
        """Channels."""
        return self.info.channels

    @property
    def divisible(self) -> bool:
        """Whether `part` works, and has exactly the samples of the whole stream."""
        # Not isinstance, which takes long for protocols: this is asked for every recording.
        return self.num_samples is not None and getattr(self._decoder, "divisible", False)

    def part(self, sample: int) -> AudioStream:
        """A second stream, from `sample` to the end, with a file position of its own. Thread-safe.

        Raises:
            DecodeError: The file cannot be read there.
        """
        assert isinstance(self._decoder, DivisibleDecoder)
        decoder = self._decoder.part(sample)
        left = (self.info.num_samples or 0) - sample
        decoder.info = dataclasses.replace(self.info, num_samples=left)
        return AudioStream(
            decoder, allow_truncated=self._allow_truncated, time_limit=self._time_limit
        )

    @property
    def num_samples(self) -> int | None:
        """Samples per channel of the stream, unless it is truncated; None if unknown."""
        return self.info.num_samples if self.info.exact else None

    def blocks(self) -> Iterator[FloatArray]:
        """Load: yield blocks `[C, n]`, float32, integer formats in [-1, 1), then close.

        Raises:
            ItemError: The samples contain NaN or Inf, or there are none. Unless truncated files
                are allowed: there are fewer samples than in the header, or the decoder fails.
        """
        done, fault = 0, None
        try:
            for block in self._in_time(self._decoder.blocks()):  # [n, C]
                self._check_finite(block, done)
                if done == 0:
                    self._check_sound(block)
                done += len(block)
                self.loaded = done
                self.on_block()
                if len(block):
                    yield block.T
        except DecodeError as error:
            fault = str(error)
        finally:
            self.close()
        self._check_complete(done, fault)

    def _in_time(self, blocks: Iterator[FloatArray]) -> Iterator[FloatArray]:
        """Check the time limit; time that the caller spends on a block does not count."""
        spent = seconds = 0.0
        while True:
            began = time.monotonic()
            block = next(blocks, None)
            spent += time.monotonic() - began
            if block is None:
                return
            seconds += len(block) / self.sample_rate
            if self._time_limit is not None and spent > self._time_limit + seconds:
                raise ItemError(
                    f"loading took {spent:.0f} s for {seconds:.0f} s of audio, longer than "
                    f"--load-timeout {self._time_limit:g} allows"
                )
            yield block

    def _check_finite(self, block: FloatArray, done: int) -> None:
        if self.info.codec in _INTEGERS:
            return
        finite = np.isfinite(block)
        if finite.all():
            return
        first = done + int(np.argmin(finite.all(axis=1)))
        at = first / self.sample_rate
        raise ItemError(f"NaN or Inf in the samples, first at sample {first} ({at:.3f} s)")

    def _check_sound(self, block: FloatArray) -> None:
        if self.channels == 2 and self.info.codec in bitstreams.CODECS:
            name = bitstreams.packed_into_pcm(block)
            if name:
                raise ItemError(
                    f"the samples are {name}, not sound: convert the file, for example with "
                    "`ffmpeg -i IN.wav OUT.flac`"
                )

    def _check_complete(self, done: int, fault: str | None) -> None:
        stated = self.num_samples
        complete = stated is None or done >= stated
        if done == 0:
            raise ItemError(f"no samples could be loaded{f': {fault}' if fault else ''}")
        if self._allow_truncated or (complete and fault is None):
            return
        if fault is None:
            raise ItemError(truncated(stated, done))
        where = f"sample {done}" + (f" of {stated}" if stated is not None else "")
        raise ItemError(f"truncated or damaged: loading stopped at {where}, {fault} {KEEP_HINT}")

    def close(self) -> None:
        """Release the decoder. Further calls do nothing."""
        self._decoder.close()
        if self._repaired:
            self._repaired.close()


def truncated(stated: int | None, loadable: int) -> str:
    """The message for a file with fewer samples than in its header."""
    return f"truncated: the header states {stated} samples, {loadable} could be loaded {KEEP_HINT}"


def without(blocks: Iterator[FloatArray], first: int, last: int | None) -> Iterator[FloatArray]:
    """Blocks without the samples from `first` to before `last`, or to the end."""
    at = 0
    for block in blocks:
        before = block[: max(0, first - at)]
        after = block[len(block) if last is None else max(0, last - at) :]
        at += len(block)
        if len(before) + len(after) >= len(block):
            yield block
        elif len(before) or len(after):
            yield np.concatenate([before, after])


def silence(count: int, channels: int) -> Iterator[FloatArray]:
    """Blocks of zeros `[n, C]` in place of lost samples.

    Raises DecodeError above `_LONGEST_GAP`, because the times in the file must be wrong then.
    """
    if count > _LONGEST_GAP:
        raise DecodeError(f"its time jumps by {count} samples")
    for start in range(0, count, BLOCK):
        yield np.zeros((min(BLOCK, count - start), channels), np.float32)
