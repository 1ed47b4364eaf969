"""Decoding with FFmpeg through PyAV: AAC, Opus, WebM, and what libsndfile cannot open.

The container format is given by `sniff`, never guessed by FFmpeg: its guesses include playlists
that make it open other files and addresses.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain

import av
import numpy as np
from numpy.typing import NDArray

from latentmill.audio.media import MediaFile
from latentmill.audio.sniff import Sniffed
from latentmill.audio.stream import BLOCK, AudioInfo, DecodeError, Samples
from latentmill.errors import ItemError

_DEMUXERS = {
    "rf64": "wav",
    "mp4": "mov",
    "wavpack": "wv",
    "ogg-vorbis": "ogg",
    "ogg-opus": "ogg",
    "ogg-flac": "ogg",
}
"""FFmpeg's name of a format, where it is not ours."""

_FULL_SCALE = {"uint8": 1 << 7, "int16": 1 << 15, "int32": 1 << 31}

_AV_ERRORS = (av.FFmpegError, ValueError, EOFError)


class PyAVDecoder:
    """A file open in FFmpeg, its first frame decoded.

    Raises:
        DecodeError: FFmpeg cannot open it or cannot decode its first samples.
        ItemError: It holds no audio.
    """

    def __init__(self, media: MediaFile, sniffed: Sniffed) -> None:
        self._format = sniffed.format
        try:
            self._container = av.open(
                "fd:",
                format=_DEMUXERS.get(sniffed.format, sniffed.format),
                options={"fd": str(media.rewind()), "protocol_whitelist": "fd"},
                metadata_errors="replace",
            )
        except _AV_ERRORS as error:
            raise DecodeError(_text(error)) from error
        try:
            self._start()
        except BaseException:
            self._container.close()
            raise

    def _start(self) -> None:
        """Decode the first frame: rate and channels of HE-AAC are known only then."""
        stream = self._container.streams.best("audio")
        if not isinstance(stream, av.AudioStream):
            raise ItemError("there is no audio stream in the file")
        stream.codec_context.thread_count = 1  # the callers have threads
        self._stream = stream
        self._frames = self._decode()
        first = next(self._frames, None)
        if first is None:
            raise ItemError("no samples could be decoded")
        self._frames = chain([first], self._frames)
        self._layout = (first.sample_rate, first.layout.nb_channels)
        self.info = AudioInfo(
            sample_rate=first.sample_rate,
            channels=first.layout.nb_channels,
            num_samples=self._promised(first.sample_rate),
            format=self._format,
            codec=stream.codec.canonical_name,
            decoder="pyav",
        )

    def blocks(self) -> Iterator[Samples]:
        """Yield blocks `[n, C]`; see `Decoder`."""
        parts: list[Samples] = []
        waiting = 0
        fault = None
        try:
            for frame in self._frames:
                parts.append(self._samples(frame))
                waiting += frame.samples
                if waiting >= BLOCK:
                    yield np.concatenate(parts)
                    parts, waiting = [], 0
        except DecodeError as error:
            fault = error
        if parts:
            yield np.concatenate(parts)
        if fault:
            raise fault

    def close(self) -> None:
        """Release the decoder."""
        self._container.close()

    def _decode(self) -> Iterator[av.AudioFrame]:
        fault: DecodeError | None = None
        try:
            for packet in self._container.demux(self._stream):
                if packet.is_corrupt:  # shorter than the container says
                    raise DecodeError("a packet is incomplete")
                try:
                    frames = packet.decode()
                except av.InvalidDataError as error:
                    fault = fault or DecodeError(_text(error))
                    continue
                if frames and fault:
                    raise fault
                yield from frames
        except _AV_ERRORS as error:
            raise DecodeError(_text(error)) from error
        # Zeros and unknown tags behind the last MP3 frame are common and harmless.
        if fault and self._format != "mp3":
            raise fault

    def _samples(self, frame: av.AudioFrame) -> Samples:
        """A frame as `[n, C]`, scaled as libsndfile scales."""
        if (frame.sample_rate, frame.layout.nb_channels) != self._layout:
            raise DecodeError("the sample rate or the channels change within the file")
        data: NDArray[np.generic] = frame.to_ndarray()  # [C, n], or packed [1, n * C]
        data = data.T if frame.format.is_planar else data.reshape(-1, self.info.channels)
        if data.dtype.kind == "f":
            return data.astype(np.float32)
        full_scale = _FULL_SCALE.get(data.dtype.name)
        if full_scale is None:
            raise DecodeError(f"samples of type {frame.format.name}")
        samples = data.astype(np.float32) / np.float32(full_scale)
        return samples - np.float32(1) if data.dtype == np.uint8 else samples

    def _promised(self, rate: int) -> int | None:
        """Samples that the container promises; None where it says so only roughly, or not."""
        duration, time_base = self._stream.duration, self._stream.time_base
        if duration is None or time_base is None or time_base.numerator != 1:
            return None
        if self._format == "ogg-opus":
            # RFC 7845, section 4.5: the last granule position counts the pre-skip (section 5.1).
            extra = self._stream.codec_context.extradata or b""
            return duration - int.from_bytes(extra[10:12], "little")
        if self._format not in ("mp4", "flac", "ogg-flac", "wavpack", "tta"):
            return None
        # HE-AAC may be counted at half its rate; milliseconds would be too coarse.
        if rate not in (time_base.denominator, 2 * time_base.denominator):
            return None
        return self._without_gap(duration) * (rate // time_base.denominator)

    def _without_gap(self, duration: int) -> int:
        """iTunes writes encoder delay, padding and length in a tag; FFmpeg uses the delay alone."""
        tag = self._container.metadata.get("iTunSMPB", "").split()
        try:
            delay, padding, length = (int(field, 16) for field in tag[1:4])
        except ValueError:
            return duration
        return length if delay + padding + length == duration else duration


def _text(error: Exception) -> str:
    text = error.strerror if isinstance(error, av.FFmpegError) else str(error)
    return " ".join((text or type(error).__name__).split())
