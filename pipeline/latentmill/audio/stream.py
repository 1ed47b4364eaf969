"""Decoded audio as a stream of blocks, what came out checked against what was promised."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from latentmill.audio import bitstreams
from latentmill.audio.media import MediaFile
from latentmill.errors import ItemError
from latentmill.record import FloatArray
from latentmill.storage.closeable import Closeable

BLOCK = 1 << 17
"""Samples per channel that a block has at most: 1 MiB of stereo."""

_LONGEST_GAP = 1 << 28
"""Samples that may be lost in one place: an hour and a half at 48 kHz."""

KEEP_HINT = "(--allow-truncated keeps what is there)"


@dataclass(frozen=True)
class AudioInfo:
    """What is known of a recording before it is decoded.

    Attributes:
        sample_rate: Hz.
        channels: Channels.
        num_samples: Samples per channel by the file's headers; None if they do not say.
        format: Container, as `sniff` names it.
        codec: Codec or sample format, such as `pcm_16`, `vorbis`, `aac`.
        decoder: `soundfile` or `pyav`.
        exact: Whether fewer samples than `num_samples` mean that some are missing. Headers of MP4
            are rounded, and those of Ogg Opus count from any number.
        rough_seconds: Length that the container gives roughly, such as by a bit rate, if it does.
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
        """Refuse a header that no recording has.

        Raises:
            ItemError: The rate or the channel count is absurd.
        """
        if not 100 <= self.sample_rate <= 1_000_000:
            raise ItemError(f"a sample rate of {self.sample_rate} Hz: not from 100 to 1000000")
        if not 1 <= self.channels <= 64:
            raise ItemError(f"{self.channels} channels: not from 1 to 64")


class DecodeError(Exception):
    """A decoder gave up. Internal: `AudioStream` turns it into an ItemError or an end."""


class Decoder(Protocol):
    """One open file in one decoder."""

    info: AudioInfo
    """What the header says."""

    def blocks(self) -> Iterator[FloatArray]:
        """Yield blocks `[n, C]`, n at most about `BLOCK`, each a fresh array.

        Raises:
            DecodeError: After everything before the fault was yielded.
        """
        ...

    def seek(self, sample: int) -> int:
        """Before `blocks()`: begin at a sample, or at an earlier one, and give its number.

        Raises:
            DecodeError: The file cannot be read there.
        """
        ...

    def close(self) -> None:
        """Release the decoder; the file stays open."""
        ...


class AudioStream(Closeable):
    """One recording being decoded: its `info`, and its samples once through `blocks()`.

    Attributes:
        info: The recording's header; of a part of a recording, `num_samples` is the part's.
    """

    def __init__(
        self,
        decoder: Decoder,
        info: AudioInfo,
        *,
        repaired: MediaFile | None = None,
        allow_truncated: bool = False,
        time_limit: float | None = None,
    ) -> None:
        self.info = info
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
    def num_samples(self) -> int | None:
        """Samples per channel that the stream has, unless it is truncated; None if not known."""
        return self.info.num_samples if self.info.exact else None

    def blocks(self) -> Iterator[FloatArray]:
        """Decode: yield blocks `[C, n]`, float32, integer formats in [-1, 1), and close.

        Raises:
            ItemError: NaN or Inf in the samples; no samples at all; and, unless truncated files
                are allowed, fewer than promised or a fault of the decoder.
        """
        done, fault = 0, None
        try:
            for block in self._in_time(self._decoder.blocks()):  # [n, C]
                self._check_finite(block, done)
                if done == 0:
                    self._check_sound(block)
                done += len(block)
                if len(block):
                    yield block.T
        except DecodeError as error:
            fault = str(error)
        finally:
            self.close()
        self._check_complete(done, fault)

    def _in_time(self, blocks: Iterator[FloatArray]) -> Iterator[FloatArray]:
        """The blocks, while they come in time; what their taker does with them does not count."""
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
                    f"decoding took {spent:.0f} s for {seconds:.0f} s of audio, longer than "
                    f"--load-timeout {self._time_limit:g} allows"
                )
            yield block

    def _check_finite(self, block: FloatArray, done: int) -> None:
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
                    f"the samples are {name}, not sound. Decode it first, for example with "
                    "`ffmpeg -i IN.wav OUT.flac`"
                )

    def _check_complete(self, done: int, fault: str | None) -> None:
        promised = self.num_samples
        complete = promised is None or done >= promised
        if done == 0:
            raise ItemError(f"no samples could be decoded{f': {fault}' if fault else ''}")
        if self._allow_truncated or (complete and fault is None):
            return
        if fault is None:
            raise ItemError(truncated(promised, done))
        where = f"sample {done}" + (f" of {promised}" if promised is not None else "")
        raise ItemError(f"truncated or damaged: decoding stopped at {where}, {fault} {KEEP_HINT}")

    def close(self) -> None:
        """Release the decoder. Closing twice is fine."""
        self._decoder.close()
        if self._repaired:
            self._repaired.close()


def truncated(promised: int | None, decodable: int) -> str:
    """The message for a file whose header promises more samples than it has."""
    return (
        f"truncated: the header promises {promised} samples, "
        f"{decodable} could be decoded {KEEP_HINT}"
    )


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
    """Blocks of zeros `[n, C]`, in place of what is lost.

    Raises:
        DecodeError: They would be so many that the time in the file must be wrong.
    """
    if count > _LONGEST_GAP:
        raise DecodeError(f"its time jumps by {count} samples")
    for start in range(0, count, BLOCK):
        yield np.zeros((min(BLOCK, count - start), channels), np.float32)
