"""Finds where the audio of a file ends according to its headers.

For formats that `headers` does not check itself. A header that cannot be parsed gives no end; the
decoder reports what is wrong with it.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from latentmill.audio.media import MediaFile

_MAX_CHUNKS = 4096  # real files have fewer; a file of zeros has a chunk every eight bytes
_MAX_PACKETS = 1 << 17  # about two days of Musepack
_ASF_PROPERTIES = bytes.fromhex("a1dcab8c47a9cf118ee400c00c205365")
_ASF_DATA = bytes.fromhex("3626b2758e66cf11a6d900aa0062ce6c")


def audio_end(media: MediaFile, name: str, offset: int) -> int | None:
    """The byte after the audio according to the headers; None if unknown.

    `name` is the format, `offset` the bytes of tags before it.
    """
    find = _FORMATS.get(name)
    try:
        return find(media, offset) if find else None
    except struct.error:  # the header itself is truncated
        return None


@dataclass(frozen=True)
class FileChunk:
    """A chunk, with the position and size of its content."""

    name: bytes
    start: int
    size: int


def chunks(
    media: MediaFile, at: int, layout: str, *, own: int = 0, pad: int = 1
) -> Iterator[FileChunk]:
    """Consecutive chunks from `at` on. `layout` is that of a header: name and size.

    The size counts `own` bytes of the header. Contents are padded to a multiple of `pad` bytes.
    """
    header = struct.calcsize(layout)
    for _ in range(_MAX_CHUNKS):
        head = media.read_at(at, header)
        if len(head) < header:
            return
        name, size = struct.unpack(layout, head)
        size -= own
        at += header
        yield FileChunk(name, at, size)
        at += max(size + -size % pad, 0)


def _dsf(media: MediaFile, at: int) -> int | None:
    """The chunks `DSD `, `fmt ` and `data`; sizes count their headers."""
    return _end_of(chunks(media, at, "<4sQ", own=12), b"data")


def _dff(media: MediaFile, at: int) -> int | None:
    """DSDIFF: the chunk `DSD ` or `DST ` in `FRM8`, sizes of 8 bytes."""
    return _end_of(chunks(media, at + 16, ">4sQ", pad=2), b"DSD ", b"DST ")


def _svx(media: MediaFile, at: int) -> int | None:
    return _end_of(chunks(media, at + 12, ">4sI", pad=2), b"BODY")


def _end_of(found: Iterator[FileChunk], *names: bytes) -> int | None:
    return next((chunk.start + chunk.size for chunk in found if chunk.name in names), None)


def _avi(media: MediaFile, at: int) -> int | None:
    """The list `movi` of the first RIFF chunk; its size is 0 if the writer could not rewind."""
    for chunk in chunks(media, at + 12, "<4sI", pad=2):
        if chunk.name == b"LIST" and media.read_at(chunk.start, 4) == b"movi":
            return chunk.start + chunk.size if 4 < chunk.size < 0xFFFF_F000 else None
    return None


def _asf(media: MediaFile, at: int) -> int | None:
    """The data object after the header object; None for a broadcast."""
    size, count = struct.unpack("<16xQI", media.read_at(at, 28))
    inner = at + 30
    for _ in range(min(count, _MAX_CHUNKS)):
        name, length = struct.unpack("<16sQ", media.read_at(inner, 24))
        if name == _ASF_PROPERTIES:
            (flags,) = struct.unpack("<I", media.read_at(inner + 88, 4))
            if flags & 1:
                return None
        if length < 24:
            return None
        inner += length
    name, length = struct.unpack("<16sQ", media.read_at(at + size, 24))
    return at + size + int(length) if name == _ASF_DATA and length > 50 else None


def _tta(media: MediaFile, at: int) -> int | None:
    """The sizes of all frames follow the header."""
    rate, samples = struct.unpack("<10xII4x", media.read_at(at, 22))
    frame = 256 * rate // 245
    frames = -(-samples // frame) if frame else 0
    if not 0 < frames <= media.size // 4:
        return None
    sizes = struct.unpack(f"<{frames}I", media.read_at(at + 22, 4 * frames))
    return at + 22 + 4 * frames + 4 + int(sum(sizes))


def _ape(media: MediaFile, at: int) -> int | None:
    """The sizes in the descriptor, which version 3.98 and later have."""
    version, *sizes = struct.unpack("<4xH2x7I", media.read_at(at, 36))
    if version < 3980:
        return None
    descriptor, header, seek_table, wav_header, low, high, _ = sizes
    return at + int(descriptor + header + seek_table + wav_header + (high << 32 | low))


def _musepack8(media: MediaFile, at: int) -> int | None:
    """Packets, each with a name of two letters and a size; `SE` is the last one."""
    at += 4
    for _ in range(_MAX_PACKETS):
        head = media.read_at(at, 11)
        size, used = 0, 0
        for used, byte in enumerate(head[2:], 1):  # noqa: B007
            size = size << 7 | byte & 0x7F
            if not byte & 0x80:
                break
        if head[:2] == b"SE" or size < 2 + used:
            return None
        at += size
        if at >= media.size:  # the file ends without `SE`
            return at + 3
    return None


def _wavpack(media: MediaFile, at: int) -> int | None:
    """Consecutive blocks with their sizes."""
    end = None
    for _ in range(_MAX_PACKETS):
        head = media.read_at(at, 8)
        if len(head) < 8 or not head.startswith(b"wvpk"):
            break
        end = at = at + 8 + int.from_bytes(head[4:], "little")
    return end


def _voc(media: MediaFile, at: int) -> int | None:
    """Blocks: their type, from 1 to 9, and a size of 3 bytes. Type 0 ends the file."""
    at += int(struct.unpack("<20xH", media.read_at(at, 22))[0])
    for _ in range(_MAX_PACKETS):
        head = media.read_at(at, 4)
        if len(head) < 4 or head[0] == 0:
            break
        at += 4 + int.from_bytes(head[1:], "little")
    return at


def _real(media: MediaFile, at: int) -> int | None:
    """RealMedia: the last chunk `DATA`, whose size FFmpeg counts 10 bytes too large.

    None for files of older versions.
    """
    end = None
    for chunk in chunks(media, at, ">4sI", own=8):
        if chunk.size < 2:
            break
        if chunk.name == b"DATA":
            end = chunk.start + chunk.size - 10
    return end


_FORMATS: dict[str, Callable[[MediaFile, int], int | None]] = {
    "dsf": _dsf,
    "dff": _dff,
    "svx": _svx,
    "avi": _avi,
    "asf": _asf,
    "tta": _tta,
    "ape": _ape,
    "musepack8": _musepack8,
    "wavpack": _wavpack,
    "voc": _voc,
    "real": _real,
}
