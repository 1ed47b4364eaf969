"""Parses streams without a file header: each frame has a sync word and its length.

A file is such a stream if two matching frame headers are exactly one frame apart.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

# Bit rates in kbit/s of MPEG audio by version (MPEG-1, or 2 and 2.5) and layer (ISO 11172-3,
# 13818-3); index 0 is "free", which no common encoder writes.
_RATES = np.zeros((2, 4, 15), np.int64)
_RATES[0, 1, 1:] = np.arange(32, 449, 32)
_RATES[0, 2, 1:] = (32, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384)
_RATES[0, 3, 1:] = (32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320)
_RATES[1, 1, 1:] = (32, 48, 56, 64, 80, 96, 112, 128, 144, 160, 176, 192, 224, 256)
_RATES[1, 2:, 1:] = (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160)
_HERTZ = np.array([[11025, 12000, 8000], [1, 1, 1], [22050, 24000, 16000], [44100, 48000, 32000]])

# Bit rates of AC-3 (ATSC A/52, table 5.18).
_AC3_RATES: tuple[int, ...] = (32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320)
_AC3_RATES += (384, 448, 512, 576, 640)


@dataclass(frozen=True)
class Frame:
    """A frame.

    Attributes:
        format: `mp3` (layers I to III), `aac` (ADTS), `ac3` or `eac3`.
        start: Its position in the given bytes.
        length: Its bytes, including the header.
        same: Values that are equal in all frames of a stream.
    """

    format: str
    start: int
    length: int
    same: tuple[int, ...]

    @property
    def end(self) -> int:
        """The position of the next frame."""
        return self.start + self.length


def first_mpeg(data: bytes, *, size: int) -> Frame | None:
    """The first frame of MPEG audio or ADTS AAC in the first bytes of a stream of `size` bytes."""
    return next(_confirmed(data, size, b"\xff", mpeg_frame), None)


def first_ac3(data: bytes, *, size: int) -> Frame | None:
    """The first frame of AC-3 or E-AC-3; the stream must begin with it."""
    return next(
        (frame for frame in _confirmed(data, size, b"\x0b\x77", ac3_frame) if not frame.start), None
    )


def _confirmed(
    data: bytes, size: int, sync: bytes, read: Callable[[bytes, int], Frame | None]
) -> Iterator[Frame]:
    start = data.find(sync)
    while start >= 0:
        first = read(data, start)
        if first is not None:
            second = read(data, first.end)
            if first.end == size or (second is not None and second.same == first.same):
                yield first
        start = data.find(sync, start + 1)


def mpeg_frame(data: bytes, start: int) -> Frame | None:
    """The frame of MPEG audio or ADTS AAC at `start`."""
    head = data[start : start + 6]
    if len(head) < 6 or head[0] != 0xFF or head[1] & 0xE0 != 0xE0:
        return None
    if head[1] & 0xF6 == 0xF0:  # ADTS: 12 sync bits, layer 0
        length = (head[3] & 3) << 11 | head[4] << 3 | head[5] >> 5
        rate = head[2] >> 2 & 15
        return (
            Frame("aac", start, length, (rate, head[3] >> 6)) if length > 7 and rate < 13 else None
        )
    length, kind = mpeg_headers(head).get(0, (0, 0))
    return Frame("mp3", start, length, (kind,)) if length else None


def mpeg_headers(data: bytes) -> dict[int, tuple[int, int]]:
    """Length and kind of a frame for each position that looks like a frame header.

    The kind combines values that are equal in a stream (version, layer and sample rate), from 1 on.
    """
    octets = np.frombuffer(data, np.uint8)
    if len(octets) < 4:
        return {}
    at = np.flatnonzero((octets[:-3] == 0xFF) & (octets[1:-2] >= 0xE0))
    second, third = octets[at + 1].astype(np.int64), octets[at + 2].astype(np.int64)
    version, layer = second >> 3 & 3, 4 - (second >> 1 & 3)
    rate, hertz = third >> 4, third >> 2 & 3
    valid = (version != 1) & (layer != 4) & (rate > 0) & (rate < 15) & (hertz != 3)
    at, version, layer, rate, hertz = (x[valid] for x in (at, version, layer, rate, hertz))
    padding = third[valid] >> 1 & 1
    bits = 1000 * _RATES[(version != 3).astype(np.int64), layer, rate]
    frequency = _HERTZ[version, hertz]
    factor = np.where((layer == 3) & (version != 3), 72, 144)
    length = np.where(
        layer == 1, (12 * bits // frequency + padding) * 4, factor * bits // frequency + padding
    )
    kind = version << 4 | layer << 2 | hertz
    return dict(zip(at.tolist(), zip(length.tolist(), kind.tolist(), strict=True), strict=True))


def id3_size(head: bytes) -> int:
    """Bytes of the ID3v2 tag that begins with `head` (ID3v2.4, section 3.1); 0 if there is none."""
    if not head.startswith(b"ID3") or len(head) < 10:
        return 0
    size = 0
    for byte in head[6:10]:
        size = size << 7 | byte & 0x7F
    return 10 + size + (10 if head[5] & 0x10 else 0)


def side_info_size(head: bytes) -> int:
    """Bytes of the side information that follows the header of an MPEG layer III frame."""
    mpeg_1, mono = head[1] >> 3 & 3 == 3, head[3] >> 6 == 3
    return (17 if mono else 32) if mpeg_1 else (9 if mono else 17)


def xing_header(data: bytes, start: int) -> tuple[int, int | None] | None:
    """Number of frames and bytes in the Xing or Info header of the frame at `start`.

    None without such a header, or if it has no number of frames.
    """
    at = start + 4 + side_info_size(data[start : start + 4])
    if data[at : at + 4] not in (b"Xing", b"Info") or len(data) < at + 16:
        return None
    flags, frames, size = struct.unpack_from(">III", data, at + 4)
    if not flags & 1 or not frames:
        return None
    return frames, size if flags & 2 else None


def ac3_frame(data: bytes, start: int) -> Frame | None:
    """The frame of AC-3 or E-AC-3 at `start` (ATSC A/52, sections 5.3.1 and E.1.2.2)."""
    head = data[start : start + 6]
    if len(head) < 6 or head[:2] != b"\x0b\x77":
        return None
    version, rate = head[5] >> 3, head[4] >> 6
    if 10 < version <= 16:
        words = ((head[2] & 7) << 8 | head[3]) + 1
        return Frame("eac3", start, 2 * words, ()) if head[2] >> 6 != 3 else None
    index = head[4] & 0x3F
    if version > 10 or rate == 3 or index >= 2 * len(_AC3_RATES):
        return None
    bit_rate = _AC3_RATES[index >> 1]
    words = (2 * bit_rate, 320 * bit_rate // 147 + (index & 1), 3 * bit_rate)[rate]
    return Frame("ac3", start, 2 * words, (rate, version))


def is_transport_stream(data: bytes) -> bool:
    """Whether the data begins with MPEG-TS packets of 188 bytes.

    Blu-ray puts a time code before each packet; other files a checksum after each packet.
    """
    layouts = ((188, 0), (192, 4), (204, 0))
    return any(
        all(data[at : at + 1] == b"\x47" for at in range(first, first + 3 * step, step))
        for step, first in layouts
    )
