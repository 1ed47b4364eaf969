"""Checks whether a file is as long as its headers say, before it is loaded.

libsndfile and FFmpeg read a truncated WAV, AIFF or Ogg file to its end and report no error. FLAC
and MP3 are not checked here: their headers count samples, so the loaded samples are counted.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass

from latentmill.audio.lengths import audio_end, chunks
from latentmill.audio.media import MediaFile
from latentmill.audio.mp4 import boxes, read_tables
from latentmill.audio.ogg import find_truncation
from latentmill.audio.sniff import Sniffed
from latentmill.errors import ItemError


@dataclass(frozen=True)
class Shortage:
    """The missing end of a file.

    Attributes:
        text: Which bytes are missing.
        num_samples: Samples according to the header, if it gives them.
    """

    text: str
    num_samples: int | None = None


def find_shortage(media: MediaFile, sniffed: Sniffed) -> Shortage | None:
    """What is missing at the end of the file according to its headers; None if nothing is.

    Nothing is missing if the header has no length (a stream that could not be rewound: size 0 or
    all ones). A missing tag after the audio does not count.
    """
    checks: dict[str, Callable[[MediaFile], Shortage | None]] = {
        "wav": _wav,
        "rf64": _wav,
        "w64": _w64,
        "aiff": _aiff,
        "au": _au,
        "caf": _caf,
        "mp4": _mp4,
        "matroska": _matroska,
    }
    if sniffed.format.startswith("ogg"):
        text = find_truncation(media)
        return Shortage(text) if text else None
    if check := checks.get(sniffed.format):
        return check(media)
    end = audio_end(media, sniffed.format, sniffed.offset)
    return None if end is None else _beyond(media, 0, end)


def _beyond(
    media: MediaFile, start: int, size: int, num_samples: int | None = None
) -> Shortage | None:
    missing = start + size - media.size
    if missing <= 0:
        return None
    return Shortage(f"{missing} bytes are missing at the end", num_samples)


def _is_streaming_size(size: int) -> bool:
    """Whether a size is one that FFmpeg, sox or arecord write to a stream that cannot rewind."""
    return size == 0 or size >= 0xFFFF_F000 or 0x7FFF_F000 <= size <= 0x8000_0000


def _wav(media: MediaFile) -> Shortage | None:
    order = ">" if media.read_at(0, 4) == b"RIFX" else "<"
    frame_bytes, long_size = 0, None
    for chunk in chunks(media, 12, f"{order}4sI", pad=2):
        if chunk.name == b"ds64":
            sizes = media.read_at(chunk.start, 16)
            long_size = struct.unpack("<Q", sizes[8:])[0] if len(sizes) == 16 else None
        elif chunk.name == b"fmt ":
            frame_bytes = _pcm_frame_bytes(media.read_at(chunk.start, 26), order)
        elif chunk.name == b"data":
            size = chunk.size
            following = media.size - chunk.start - size
            if frame_bytes and following >= 1 << 32 and not (long_size or _is_streaming_size(size)):
                raise ItemError(
                    f"the size in the WAV header has wrapped at 4 GiB: it is {size} bytes, but "
                    f"{following} more follow: convert the file with "
                    "`ffmpeg -ignore_length 1 -i IN.wav -rf64 always OUT.wav`"
                )
            if size == 0xFFFF_FFFF and long_size:
                size = long_size
            elif _is_streaming_size(size):
                return None
            return _beyond(media, chunk.start, size, size // frame_bytes if frame_bytes else None)
    return None


def mpeg_in_wav(media: MediaFile) -> tuple[int, int] | None:
    """Start and end of the MPEG audio in a WAV file; None if its audio is not MPEG."""
    mpeg = False
    for chunk in chunks(media, 12, "<4sI", pad=2):
        if chunk.name == b"fmt ":
            mpeg = media.read_at(chunk.start, 2) in (b"\x50\0", b"\x55\0")
        elif chunk.name == b"data":
            end = chunk.start + chunk.size
            return (chunk.start, min(end, media.size)) if mpeg and chunk.size else None
    return None


def _pcm_frame_bytes(fmt: bytes, order: str) -> int:
    """Bytes per sample of all channels by a `fmt ` chunk; 0 if samples have no fixed size."""
    if len(fmt) < 16:
        return 0
    tag, block_align = struct.unpack_from(f"{order}H10xH", fmt)
    if tag == 0xFFFE and len(fmt) == 26:  # extensible: the tag is the start of the sub-format
        tag = struct.unpack_from(f"{order}H", fmt, 24)[0]
    return block_align if tag in (1, 3, 6, 7) else 0


@dataclass(frozen=True)
class W64Data:
    """The data chunk of a Wave64 file; `samples` is None if samples have no fixed size."""

    start: int
    size: int
    samples: int | None


def find_w64_data(media: MediaFile) -> W64Data | None:
    """Sony Wave64: 16-byte names, 64-bit sizes that count the header, padded to 8 bytes.

    None if there is no data chunk, or if its size is not known.
    """
    frame_bytes = 0
    for chunk in chunks(media, 40, "<4s12xQ", own=24, pad=8):
        if chunk.name == b"fmt ":
            frame_bytes = _pcm_frame_bytes(media.read_at(chunk.start, 26), "<")
        elif chunk.name == b"data":
            if not 0 < chunk.size < 1 << 63:
                return None
            samples = chunk.size // frame_bytes if frame_bytes else None
            return W64Data(chunk.start, chunk.size, samples)
    return None


def _w64(media: MediaFile) -> Shortage | None:
    data = find_w64_data(media)
    return None if data is None else _beyond(media, data.start, data.size, data.samples)


def _aiff(media: MediaFile) -> Shortage | None:
    samples = None
    for chunk in chunks(media, 12, ">4sI", pad=2):
        if chunk.name == b"COMM":
            head = media.read_at(chunk.start, 6)
            samples = struct.unpack(">I", head[2:])[0] if len(head) == 6 else None
        elif chunk.name == b"SSND":
            return (
                None
                if _is_streaming_size(chunk.size)
                else _beyond(media, chunk.start, chunk.size, samples)
            )
    return None


def _au(media: MediaFile) -> Shortage | None:
    head = media.read_at(0, 24)
    if len(head) < 24:
        return None
    order = ">" if head[:4] == b".snd" else "<"
    start, size, encoding, _, channels = struct.unpack(f"{order}5I", head[4:])
    width = {1: 1, 2: 1, 3: 2, 4: 3, 5: 4, 6: 4, 7: 8, 27: 1}.get(encoding, 0) * channels
    if _is_streaming_size(size):
        return None
    return _beyond(media, start, size, size // width if width else None)


def _caf(media: MediaFile) -> Shortage | None:
    frame_bytes = 0
    for chunk in chunks(media, 8, ">4sq"):
        if chunk.name == b"desc":
            description = media.read_at(chunk.start, 24)
            if len(description) == 24 and description[20:] == b"\0\0\0\1":
                frame_bytes = struct.unpack_from(">I", description, 16)[0]
        elif chunk.name == b"data":
            if chunk.size < 4:  # -1: up to the end of the file
                return None
            samples = (chunk.size - 4) // frame_bytes if frame_bytes else None
            return _beyond(media, chunk.start, chunk.size, samples)
    return None


def _mp4(media: MediaFile) -> Shortage | None:
    """Check the sample tables, or without tables the top-level boxes (ISO 14496-12, 4.2)."""
    tables = read_tables(media)
    if tables is not None and (shortage := _beyond(media, 0, tables.end)):
        return shortage
    needed = (b"moov", b"moof") if tables is not None else (b"mdat", b"moov", b"moof")
    for name, at, _, end in boxes(media):
        if name in needed and (shortage := _beyond(media, at, end - at)):
            return shortage
    return None


def _matroska(media: MediaFile) -> Shortage | None:
    """The EBML header and then the segment, which spans the file (RFC 8794, section 6)."""
    at = 0
    for name in (b"\x1a\x45\xdf\xa3", b"\x18\x53\x80\x67"):
        head = media.read_at(at, 12)
        if not head.startswith(name) or len(head) < 5 or head[4] == 0:
            return None
        length = 9 - head[4].bit_length()
        mask = (1 << 7 * length) - 1
        size = int.from_bytes(head[4 : 4 + length], "big") & mask
        if size == mask:  # unknown: a live recording
            return None
        at += 4 + length
        if name == b"\x18\x53\x80\x67":
            return _beyond(media, at, size)
        at += size
    return None
