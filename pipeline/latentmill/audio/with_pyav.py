"""Loads audio with FFmpeg through PyAV: AAC, Opus, WebM, and files that libsndfile cannot load.

The container format comes from `sniff`. FFmpeg never guesses it, because it might find a playlist
and open other files and addresses.
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
from latentmill.audio.packing import FramePacker
from latentmill.audio.sniff import Sniffed
from latentmill.audio.stream import KEEP_HINT, AudioInfo, DecodeError, silence, without
from latentmill.audio.survey import NOTHING, Survey
from latentmill.record import FloatArray

# Protocols and codecs that FFmpeg may use; no video and no images.
_LIMITS = {"protocol_whitelist": "fd", "codec_whitelist": ",".join(sorted(DECODERS))}

_PACKED = 1 << 16
"""Samples per channel of a block."""

_EXACT = ("flac", "wavpack")
"""Formats whose header has the exact number of samples."""

_CHECKS = {
    "flac": "crccheck+explode",
    "wavpack": "crccheck",
    "tta": "crccheck+explode",
    "ape": "crccheck+explode",
}
"""Options with which FFmpeg compares the checksums of a codec."""

_UNTRIMMED = ("opus", "vorbis")
"""Codecs in MP4 whose last frame FFmpeg does not trim."""

_STREAMS = ("mp3", "aac", "ac3", "eac3", "dts", "mpegts", "mpeg")
"""Formats that may begin in the middle of a frame, or with bytes that are not audio."""

_MATROSKA_SLACK = 0.25
"""Seconds by which the length in a header may be too long."""

_MAX_JUNK = 1000
"""Maximum number of invalid pieces of a file that are skipped."""

AV_ERRORS = (av.FFmpegError, ValueError, EOFError)


class PyAVDecoder:
    """A file that is open in FFmpeg.

    With `keep`, damaged parts become silence instead of an error. Raises DecodeError if FFmpeg
    cannot open the file or decode its first frame.
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
            stack.pop_all()  # close() closes the container

    def _start(self) -> None:
        """Decode the first frame: rate and channels of HE-AAC are known only then."""
        stream = self._container.streams.best("audio")
        if not isinstance(stream, av.AudioStream):
            raise DecodeError("it contains no audio stream")
        if stream.codec_context is None or stream.codec.name not in DECODERS:
            raise DecodeError("its codec is not supported")
        stream.codec_context.thread_count = 1  # callers use threads
        if check := _CHECKS.get(stream.codec.canonical_name):
            stream.codec_context.options = {"err_detect": check}
        self._stream = stream
        self._begin: int | None = None
        self._damaged = False
        self._frames = self._decode()
        first = next(self._frames, None)
        if first is None:
            raise DecodeError("it contains no samples")
        self._frames = chain([first], self._frames)
        self._layout, self._first = first.layout, first.pts
        self._origin = first.pts or 0
        if self._damaged:  # the first frames are lost, perhaps with AAC frames before time 0
            self._origin = max(0, self._begin or 0)
        self._tables = read_tables(self._media) if self._format == "mp4" else None
        stated = self._stated(first.sample_rate)
        self._limit = self._itunes_length()
        exact = self._limit is not None or (self._format in _EXACT and self._found.counted)
        # An edit list may end within a frame, which FFmpeg before version 9 does not trim.
        if self._limit is None and self._tables:
            self._limit = stated if stream.codec.canonical_name not in _UNTRIMMED else None
        if self._limit is not None and exact is False:
            self._limit = self._by_tables(self._limit, first.sample_rate)
        self.info = AudioInfo(
            sample_rate=first.sample_rate,
            channels=first.layout.nb_channels,
            num_samples=self._limit or stated,
            format=self._format,
            codec=stream.codec.canonical_name,
            decoder="pyav",
            exact=exact,
            rough_seconds=self._rough_seconds(),
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
                text = "AAC in WAV has no frame positions: use the original file"
                raise DecodeError(text) from error
            raise

    def _all_blocks(self) -> Iterator[FloatArray]:
        done, least = 0, self._least()
        checked = self._stream.codec.canonical_name in _CHECKS  # `amovie` has no option for this
        if least is not None and not self._keep and not checked:
            with contextlib.suppress(DecodeError):
                for block in self._in_one_go():
                    done += len(block)
                    yield block
                if done > least:
                    return
            # Something is wrong: decode by packet to find the fault and all samples before it.
            self.close()
            self._open()  # `amovie` has moved the position of the descriptor
        total = 0
        for block in self._by_packet():
            total += len(block)
            if len(block) > done:
                yield block[done:]
            done -= min(done, len(block))
        if least is not None and not self._keep and total <= least:
            raise DecodeError(f"the file's tables state at least {int(least) + 1} samples")

    def _by_tables(self, limit: int, rate: int) -> int:
        """The number of samples in the tables if it agrees with `limit`, or else `limit`.

        `limit` comes from an edit list, which is rounded to the movie's timescale, mostly to a
        millisecond.
        """
        tables, track, base = self._tables, self._stream.id, self._stream.time_base
        if not tables or not tables.timescales.get(track) or base is None:
            return limit
        if tables.edit_timescales.get(track, 0) >= rate:
            return limit
        dropped = float(((self._first or 0) - (self._begin or 0)) * base)
        seconds = tables.durations.get(track, 0) / tables.timescales[track] - dropped
        samples = round(seconds * rate)
        return samples if abs(samples - limit) <= rate / 1000 else limit

    def _least(self) -> float | None:
        """Samples are lost if there are not more than this number; None if unknown."""
        rate, stated = self.info.sample_rate, self.info.num_samples
        if self._format == "ogg-opus" and stated is not None:
            return stated - 1
        if self._format != "mp4":
            return None
        tables, base = self._tables, self._stream.time_base
        seconds = tables.seconds(self._stream.id) if tables else None
        if tables is None or seconds is None or base is None:
            return None
        if self._first is None or self._begin is None:
            return None
        whole, longest = seconds
        least = whole - longest - float((self._first - self._begin) * base)  # dropped at the start
        if not tables.fragmented and self._stream.duration:
            # An edit list may end before the samples do. It is rounded to a millisecond.
            least = min(least, float(self._stream.duration * base) - 1e-3)
        return least * rate

    def _in_one_go(self) -> Iterator[FloatArray]:
        """Blocks `[n, C]` from FFmpeg's `amovie` filter.

        Demuxing and decoding stay in C for a whole block. With calls for each packet, threads would
        spend more time waiting for Python's lock than decoding. The filter reports few faults, and
        loses up to a block before them.
        """
        options = f"fd={self._media.rewind()}:protocol_whitelist=fd:fflags=+discardcorrupt"
        shape = (self.info.sample_rate, self.info.channels)
        try:
            graph = av.filter.Graph()
            graph.threads = 1  # callers use threads
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
                    raise DecodeError("the sample rate or the channels change within the file")
                yield _array(frame)
        except EOFError:
            return
        except AV_ERRORS as error:
            raise DecodeError(_text(error)) from error

    def _by_packet(self) -> Iterator[FloatArray]:
        # Convert to packed floats at the same rate, because PyAV (18.1) cannot convert planar
        # frames to arrays: it expects a null after the last plane, which is missing from eight
        # channels on.
        packer = FramePacker(self._layout, self.info.sample_rate, _PACKED)
        fault, done = None, 0
        try:
            for frame in self._frames:
                if gap := self._gap(frame, done):
                    yield from self._packed(packer, None)
                    packer = FramePacker(self._layout, self.info.sample_rate, _PACKED)
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
            # FFmpeg does not report clusters that it skips.
            fault = DecodeError(f"the header states {seconds:.3f} s")
        stated = self.info.num_samples or 0
        whole = self._format == "wavpack" and 0 < stated <= done  # only tags follow
        if fault and not whole:
            raise fault

    def _gap(self, frame: av.AudioFrame, done: int) -> int:
        """Number of samples missing before a frame according to its time; 0 without damage."""
        unreported = ("flac", "matroska", "mp4")  # FFmpeg skips unreadable data
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
        """Start at 0, which is exact for every codec, such as AAC with synthesised noise."""
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
                # Shorter than in the container; other formats read to the end of the file.
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
        # Zeros and unknown tags after the last MP3 frame are common and harmless.
        if fault and self._format != "mp3":
            raise fault

    def _packets(self) -> Iterator[av.Packet[av.AudioStream]]:
        for _ in range(_MAX_JUNK):
            try:
                yield from self._container.demux(self._stream)
            except av.BlockingIOError:  # MPEG-TS: an invalid piece
                continue
            return

    def _packed(self, packer: FramePacker, frame: av.AudioFrame | None) -> list[FloatArray]:
        """The next blocks `[n, C]`, scaled as in libsndfile."""
        rate, channels = self.info.sample_rate, self.info.channels
        if frame and (frame.sample_rate, frame.layout.nb_channels) != (rate, channels):
            raise DecodeError("the sample rate or the channels change within the file")
        try:
            return [_array(out) for out in packer.push(frame)]
        except AV_ERRORS as error:
            raise DecodeError(_text(error)) from error

    def _stated(self, rate: int) -> int | None:
        """Samples according to the container's header; None if approximate or unknown."""
        duration, time_base = self._stream.duration, self._stream.time_base
        if duration is None or time_base is None or time_base.numerator != 1:
            return None
        if not self._found.counted or (self._tables and self._tables.fragmented):
            return None  # more samples follow; the lengths of fragments are not exact
        if self._format == "ogg-opus":
            # RFC 7845, section 4.5: the last granule position counts the pre-skip (section 5.1).
            extra = self._stream.codec_context.extradata or b""
            start = max(0, self._stream.start_time or 0)
            return max(0, duration - start - int.from_bytes(extra[10:12], "little"))
        if self._format not in ("mp4", "flac", "ogg-flac", "wavpack"):
            return None
        # HE-AAC may count at half its rate; milliseconds are too coarse.
        if rate not in (time_base.denominator, 2 * time_base.denominator):
            return None
        return duration * (rate // time_base.denominator) - self._found.skipped

    def _rough_seconds(self) -> float | None:
        duration = self._container.duration
        return duration / av.time_base if duration and self._found.counted else None

    def _itunes_length(self) -> int | None:
        """The length in a tag of iTunes, of which FFmpeg only uses the encoder delay."""
        tag = self._container.metadata.get("iTunSMPB", "").split()
        try:
            delay, padding, length = (int(field, 16) for field in tag[1:4])
        except ValueError:
            return None
        return length if delay + padding + length == self._stream.duration else None


def _is_mpeg(packet: av.Packet[av.AudioStream]) -> bool:
    head = bytes(packet).lstrip(b"\0")[:2]  # the decoder also skips zeros
    return len(head) == 2 and head[0] == 0xFF and head[1] >= 0xE0


def _array(frame: av.AudioFrame) -> FloatArray:
    """A frame of packed floats as `[n, C]`."""
    array = frame.to_ndarray().reshape(-1, frame.layout.nb_channels)  # [1, n * C] before
    return array.astype(np.float32, copy=False)


def _text(error: Exception) -> str:
    if isinstance(error, av.error.UndefinedError):  # FFmpeg has no text for it
        return "a frame is damaged"
    if isinstance(error, av.error.MemoryError):
        return "its header contains numbers that are too large"
    text = error.strerror if isinstance(error, av.FFmpegError) else str(error)
    return " ".join((text or type(error).__name__).split())
