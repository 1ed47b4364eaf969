"""Decoding with FFmpeg through PyAV: AAC, Opus, WebM, and what libsndfile cannot open.

The container format is given by `sniff`, never guessed by FFmpeg: its guesses include playlists
that make it open other files and addresses.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from itertools import chain

import av
import numpy as np

from latentmill.audio.formats import DECODERS, FORMATS
from latentmill.audio.media import MediaFile
from latentmill.audio.mp4 import read_tables
from latentmill.audio.sniff import Sniffed
from latentmill.audio.stream import KEEP_HINT, AudioInfo, DecodeError, silence, without
from latentmill.audio.survey import NOTHING, Survey
from latentmill.record import FloatArray

# What FFmpeg may open and run while it looks for the streams: not video, nor pictures.
_LIMITS = {"protocol_whitelist": "fd", "codec_whitelist": ",".join(sorted(DECODERS))}

_PACKED = 1 << 16
"""Samples per channel of a block."""

_COUNTED = ("mp4", "ogg-opus")
"""Formats that say how many samples there are at least, so that a fault that FFmpeg keeps to itself
is noticed."""

_EXACT = ("flac", "wavpack")
"""Formats whose header counts samples, so that fewer of them are a loss."""

_CHECKS = {
    "flac": "crccheck+explode",
    "wavpack": "crccheck",
    "tta": "crccheck+explode",
    "ape": "crccheck+explode",
}
"""What makes FFmpeg compare a codec's checksums."""

_UNTRIMMED = ("opus", "vorbis")
"""Codecs in MP4 that FFmpeg gives to the end of their last frame."""

_STREAMS = ("mp3", "aac", "ac3", "eac3", "dts", "mpegts", "mpeg")
"""Formats that may begin in the middle of a frame, or with bytes that are no audio."""

_MATROSKA_SLACK = 0.25
"""Seconds that a header may promise too many."""

_MAX_JUNK = 1000
"""Pieces of junk in a file that are passed over."""

AV_ERRORS = (av.FFmpegError, ValueError, EOFError)


class PyAVDecoder:
    """A file open in FFmpeg, its first frame decoded.

    Args:
        media: The file.
        sniffed: Its format.
        found: What its bytes say.
        keep: Go on behind a damaged place, and put silence in its place.

    Raises:
        DecodeError: FFmpeg cannot open it, or cannot decode its first samples.
    """

    def __init__(
        self, media: MediaFile, sniffed: Sniffed, found: Survey = NOTHING, *, keep: bool = False
    ) -> None:
        self._media = media
        self._format = sniffed.format
        self._found, self._keep = found, keep
        self._demuxer = FORMATS[sniffed.format].demuxer
        self._open()

    def _open(self) -> None:
        try:
            self._container = av.open(
                "fd:",
                format=self._demuxer,
                options={"fd": str(self._media.rewind()), **_LIMITS},
                metadata_errors="replace",
            )
        except AV_ERRORS as error:
            raise DecodeError(_text(error)) from error
        with contextlib.ExitStack() as stack:
            stack.callback(self._container.close)
            self._start()
            stack.pop_all()  # from here on close() does it

    def _start(self) -> None:
        """Decode the first frame: rate and channels of HE-AAC are known only then."""
        stream = self._container.streams.best("audio")
        if not isinstance(stream, av.AudioStream):
            raise DecodeError("it holds no audio stream")
        if stream.codec_context is None or stream.codec.name not in DECODERS:
            raise DecodeError("its codec is not one that can be decoded")
        stream.codec_context.thread_count = 1  # the callers have threads
        if check := _CHECKS.get(stream.codec.canonical_name):
            stream.codec_context.options = {"err_detect": check}
        self._stream = stream
        self._begin: int | None = None
        self._damaged = False
        self._frames = self._decode()
        first = next(self._frames, None)
        if first is None:
            raise DecodeError("it holds no samples")
        self._frames = chain([first], self._frames)
        self._layout, self._first = first.layout, first.pts
        self._origin = first.pts or 0
        if self._damaged:  # the first frames are lost; those of AAC before 0 would be dropped
            self._origin = max(0, self._begin or 0)
        promised = self._promised(first.sample_rate)
        self._tables = read_tables(self._media) if self._format == "mp4" else None
        self._limit = self._itunes_length()
        exact = self._limit is not None or self._format in _EXACT
        # An edit list ends within a frame, which FFmpeg before version 9 gives whole.
        if self._limit is None and self._tables and not self._tables.fragmented:
            self._limit = promised if stream.codec.canonical_name not in _UNTRIMMED else None
        if self._limit is not None and exact is False:
            self._limit = self._by_tables(self._limit, first.sample_rate)
        self.info = AudioInfo(
            sample_rate=first.sample_rate,
            channels=first.layout.nb_channels,
            num_samples=self._limit or promised,
            format=self._format,
            codec=stream.codec.canonical_name,
            decoder="pyav",
            exact=exact,
            rough_seconds=(self._container.duration or 0) / av.time_base or None,
        )

    def blocks(self) -> Iterator[FloatArray]:
        """Yield blocks `[n, C]`; see `Decoder`."""
        count, at = self._found.dropped
        blocks = self._all_blocks()
        if count:
            blocks = without(blocks, at - count, at)
        if self._limit is not None:
            blocks = without(blocks, self._limit, None)
        try:
            yield from blocks
        except DecodeError as error:
            if self._format == "wav" and self.info.codec == "aac":
                text = "AAC in WAV does not say where its frames begin: use what it was made from"
                raise DecodeError(text) from error
            raise

    def _all_blocks(self) -> Iterator[FloatArray]:
        done, least = 0, self._least()
        checked = self._stream.codec.canonical_name in _CHECKS  # which `amovie` cannot be told
        if least is not None and not self._keep and not checked:
            with contextlib.suppress(DecodeError):
                for block in self._in_one_go():
                    done += len(block)
                    yield block
                if done > least:
                    return
            # Something is wrong. The packets, one by one, tell what, and give the samples up to it.
            self.close()
            self._open()  # the two share the descriptor's position
        total = 0
        for block in self._by_packet():
            total += len(block)
            if len(block) > done:
                yield block[done:]
            done -= min(done, len(block))
        if least is not None and not self._keep and total <= least:
            raise DecodeError(f"the file's tables promise at least {int(least) + 1} samples")

    def _by_tables(self, limit: int, rate: int) -> int:
        """Samples by an edit list, which is rounded to a millisecond, or as the tables count them
        if the two agree.
        """
        tables, track, base = self._tables, self._stream.id, self._stream.time_base
        if not tables or not tables.timescales.get(track) or base is None:
            return limit
        dropped = float(((self._first or 0) - (self._begin or 0)) * base)
        seconds = tables.durations.get(track, 0) / tables.timescales[track] - dropped
        samples = round(seconds * rate)
        return samples if abs(samples - limit) <= rate / 1000 else limit

    def _least(self) -> float | None:
        """If no more samples than this come, some are lost; None if that cannot be said."""
        rate, promised = self.info.sample_rate, self.info.num_samples
        if self._format == "ogg-opus" and promised is not None:
            return promised - 1
        if self._format != "mp4":
            return None
        tables, base = self._tables, self._stream.time_base
        seconds = tables.seconds(self._stream.id) if tables else None
        if tables is None or seconds is None or base is None:
            return None
        if self._first is None or self._begin is None:
            return None
        whole, longest = seconds
        least = whole - longest - float((self._first - self._begin) * base)  # dropped in front
        if not tables.fragmented and self._stream.duration:
            # An edit list may end before the samples do. It is rounded to a millisecond.
            least = min(least, float(self._stream.duration * base) - 1e-3)
        return least * rate

    def _in_one_go(self) -> Iterator[FloatArray]:
        """Blocks `[n, C]` from FFmpeg's `amovie` filter, which says little of faults and keeps
        up to a block of what lies before them.

        Demuxing and decoding stay in C for a whole block: with calls for every packet, threads
        spend more time on handing each other Python's lock than on decoding.
        """
        options = f"fd={self._media.rewind()}:protocol_whitelist=fd:fflags=+discardcorrupt"
        shape = (self.info.sample_rate, self.info.channels)
        try:
            graph = av.filter.Graph()
            graph.threads = 1  # the callers have threads
            source = graph.add(
                "amovie",
                filename="fd:",
                format_name=self._demuxer,
                format_opts=options,
                stream_index=str(self._stream.index),
                dec_threads="1",
            )
            packed, sink = graph.add("aformat", sample_fmts="flt"), graph.add("abuffersink")
            source.link_to(packed)
            packed.link_to(sink)
            graph.configure()
            graph.set_audio_frame_size(_PACKED)
            while True:
                frame = sink.pull()
                assert isinstance(frame, av.AudioFrame)
                if (frame.sample_rate, frame.layout.nb_channels) != shape:
                    raise DecodeError("the sample rate or the channels are not the first frame's")
                yield _array(frame)
        except EOFError:
            return
        except AV_ERRORS as error:
            raise DecodeError(_text(error)) from error

    def _by_packet(self) -> Iterator[FloatArray]:
        # Packed floats at the same rate. Planar frames never become arrays: PyAV (18.1) looks
        # for a null after the last plane, which is not there from eight channels on.
        packer = av.AudioResampler("flt", self._layout, self.info.sample_rate, _PACKED)
        fault, done = None, 0
        try:
            for frame in self._frames:
                if gap := self._gap(frame, done):
                    yield from self._packed(packer, None)
                    packer = av.AudioResampler("flt", self._layout, self.info.sample_rate, _PACKED)
                    yield from silence(gap, self.info.channels)
                done += gap + frame.samples
                yield from self._packed(packer, frame)
        except DecodeError as error:
            fault = error
        yield from self._packed(packer, None)
        start = max(0, self._container.start_time or 0)
        seconds = ((self._container.duration or 0) - start) / av.time_base
        alone = self._format == "matroska" and len(self._container.streams) == 1
        if alone and not fault and done / self.info.sample_rate < seconds - _MATROSKA_SLACK:
            # FFmpeg does not report clusters that it cannot read.
            fault = DecodeError(f"the header promises {seconds:.3f} s")
        promised = self.info.num_samples or 0
        whole = self._format == "wavpack" and 0 < promised <= done  # what follows are tags
        if fault and not whole:
            raise fault

    def _gap(self, frame: av.AudioFrame, done: int) -> int:
        """Samples that are missing before a frame, by its time; 0 unless damage was met."""
        unreported = ("flac", "matroska", "mp4")  # FFmpeg leaves out what it cannot read
        if not (self._damaged or (self._keep and self._format in unreported)):
            return 0
        if frame.pts is None or self._first is None or not frame.time_base:
            return 0
        damaged, self._damaged = self._damaged, False
        second = frame.sample_rate * frame.time_base
        gap = round((frame.pts - self._origin) * second) - done
        frames = round(gap / frame.samples) * frame.samples
        if abs(gap - frames) <= second:  # Matroska counts milliseconds
            gap = frames
        if self._format != "flac" and not damaged and 4 * gap < frame.samples:  # rounded times
            return 0
        return max(0, gap)

    def seek(self, sample: int) -> int:
        """Stay at the start: exact for every codec, such as AAC that synthesises noise."""
        return 0

    def close(self) -> None:
        """Release the decoder."""
        self._container.close()

    def _decode(self) -> Iterator[av.AudioFrame]:
        fault: DecodeError | None = None
        begun = False
        try:
            for packet in self._packets():
                self._begin = packet.pts if self._begin is None else self._begin
                # Shorter than the container says; others read to the end of the file.
                if packet.is_corrupt and self._format in ("mp4", "matroska", "wavpack"):
                    if not self._keep:
                        raise DecodeError("a packet is incomplete")
                    self._damaged = True
                    continue
                if self._format == "mp3" and packet.size and not _is_mpeg(packet):
                    continue  # tags, also between joined files, and zeros
                try:
                    frames = packet.decode()
                except (av.InvalidDataError, av.error.UndefinedError) as error:
                    if begun or self._format not in _STREAMS:
                        fault, self._damaged = fault or DecodeError(_text(error)), True
                    continue
                if frames and fault and not self._keep:
                    raise (
                        fault if begun else DecodeError(f"its first frames are damaged {KEEP_HINT}")
                    )
                begun = begun or bool(frames)
                yield from frames
        except AV_ERRORS as error:
            raise DecodeError(_text(error)) from error
        # Zeros and unknown tags behind the last MP3 frame are common and harmless.
        if fault and self._format != "mp3":
            raise fault

    def _packets(self) -> Iterator[av.Packet[av.AudioStream]]:
        for _ in range(_MAX_JUNK):
            try:
                yield from self._container.demux(self._stream)
            except av.BlockingIOError:  # MPEG-TS: a piece of junk, and more may follow
                continue
            return

    def _packed(self, packer: av.AudioResampler, frame: av.AudioFrame | None) -> list[FloatArray]:
        """What is ready of the frames so far as blocks `[n, C]`, scaled as libsndfile scales."""
        rate, channels = self.info.sample_rate, self.info.channels
        if frame and (frame.sample_rate, frame.layout.nb_channels) != (rate, channels):
            raise DecodeError("the sample rate or the channels change within the file")
        try:
            return [_array(out) for out in packer.resample(frame)]
        except AV_ERRORS as error:
            raise DecodeError(_text(error)) from error

    def _promised(self, rate: int) -> int | None:
        """Samples by the container's header; None where it says so only roughly, or not."""
        duration, time_base = self._stream.duration, self._stream.time_base
        if duration is None or time_base is None or time_base.numerator != 1:
            return None
        if self._format == "ogg-opus":
            # RFC 7845, section 4.5: the last granule position counts the pre-skip (section 5.1).
            extra = self._stream.codec_context.extradata or b""
            start = max(0, self._stream.start_time or 0)
            return max(0, duration - start - int.from_bytes(extra[10:12], "little"))
        if self._format not in ("mp4", "flac", "ogg-flac", "wavpack"):
            return None
        # HE-AAC may be counted at half its rate; milliseconds would be too coarse.
        if rate not in (time_base.denominator, 2 * time_base.denominator):
            return None
        return duration * (rate // time_base.denominator) - self._found.skipped

    def _itunes_length(self) -> int | None:
        """iTunes writes encoder delay, padding and length in a tag; FFmpeg uses the delay alone."""
        tag = self._container.metadata.get("iTunSMPB", "").split()
        try:
            delay, padding, length = (int(field, 16) for field in tag[1:4])
        except ValueError:
            return None
        return length if delay + padding + length == self._stream.duration else None


def _is_mpeg(packet: av.Packet[av.AudioStream]) -> bool:
    head = bytes(packet).lstrip(b"\0")[:2]  # the decoder skips zeros, too
    return len(head) == 2 and head[0] == 0xFF and head[1] >= 0xE0


def _array(frame: av.AudioFrame) -> FloatArray:
    """A frame of packed floats as `[n, C]`."""
    array = frame.to_ndarray().reshape(-1, frame.layout.nb_channels)  # [1, n * C] before
    return array.astype(np.float32, copy=False)


def _text(error: Exception) -> str:
    if isinstance(error, av.error.UndefinedError):  # FFmpeg has a number for it, and no text
        return "a frame is damaged"
    if isinstance(error, av.error.MemoryError):
        return "its header has numbers that are too large"
    text = error.strerror if isinstance(error, av.FFmpegError) else str(error)
    return " ".join((text or type(error).__name__).split())
