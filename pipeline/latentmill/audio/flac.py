"""Checks whether the header of a FLAC file counts all of its samples (RFC 9639).

libsndfile stops at the length in STREAMINFO, even if more audio follows.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from latentmill.audio.media import MediaFile

_LAST = 1 << 15  # most frames are shorter
_TAIL = 1 << 17
_WINDOW = 1 << 22
_MAX_BLOCKS = 4096
_STREAM = re.compile(rb"fLaC[\x00\x80]\x00\x00\x22")
_CRC8 = [0] * 256
for _byte in range(256):
    _value = _byte
    for _ in range(8):
        _value = _value << 1 ^ (0x107 if _value & 0x80 else 0)
    _CRC8[_byte] = _value & 0xFF


def other_streams(media: MediaFile, offset: int) -> Iterator[int]:
    """Positions of further FLAC streams after the first one, as in joined files."""
    at = offset + 8
    while data := media.read_at(at, _WINDOW):
        yield from (at + found.start() for found in _STREAM.finditer(data))
        if at + len(data) >= media.size:
            break
        at += len(data) - 7


def sample_format(media: MediaFile, at: int) -> tuple[int, int, int]:
    """Sample rate, channels and bits of the stream that begins at byte `at`."""
    bits = int.from_bytes(media.read_at(at + 18, 4), "big")
    return bits >> 12, (bits >> 9 & 7) + 1, (bits >> 4 & 31) + 1


def ends_as_stated(media: MediaFile, offset: int) -> bool:
    """Whether a frame near the end of the file ends at the total samples of STREAMINFO."""
    total = _total_samples(media, offset)
    return any(end == total for end in _last_ends(media, offset))


def ends_later(media: MediaFile, offset: int) -> bool:
    """Whether frames near the end of the file end after the total samples of STREAMINFO.

    One such frame is not enough, because other bytes can look like the header of a frame.
    """
    total = _total_samples(media, offset)
    return sum(end > total for end in _last_ends(media, offset)) > 1


def _total_samples(media: MediaFile, offset: int) -> int:
    return int.from_bytes(media.read_at(offset + 21, 5), "big") & 0xF_FFFF_FFFF


def _last_ends(media: MediaFile, offset: int) -> Iterator[int]:
    """The position in samples after each frame near the end of the file, the last frame first."""
    fixed = int.from_bytes(media.read_at(offset + 8, 2), "big")
    searched = media.size
    for length in (_LAST, _TAIL):
        begin = max(offset, media.size - length)
        tail = media.read_at(begin, searched - begin + 16)
        at = tail.rfind(b"\xff", 0, searched - begin)
        while at >= 0:
            end = _frame_end(tail[at : at + 16], fixed)
            if end is not None:
                yield end
            at = tail.rfind(b"\xff", 0, at)
        searched = begin


def first_sample(media: MediaFile, offset: int) -> int:
    """The number of the first sample; not 0 in streams that were split without re-encoding."""
    at = offset + 4
    for _ in range(_MAX_BLOCKS):
        head = media.read_at(at, 4)
        if len(head) < 4:
            return 0
        at += 4 + int.from_bytes(head[1:], "big")
        if head[0] & 0x80:
            break
    fixed = int.from_bytes(media.read_at(offset + 8, 2), "big")
    head = media.read_at(at, 16)
    if _frame_end(head, fixed) is None:
        return 0
    number = _coded_number(head, 4)[0] or 0
    return number if head[1] & 1 else number * fixed


def _frame_end(head: bytes, fixed: int) -> int | None:
    """The sample after a frame by its header (section 9.1); None if it is not a frame header."""
    if len(head) < 6 or head[1] & 0xFC != 0xF8:
        return None
    number, at = _coded_number(head, 4)
    if number is None:
        return None
    code, extra = head[2] >> 4, head[at : at + 2]
    if code == 6:
        size, at = extra[0] + 1, at + 1
    elif code == 7:
        size, at = int.from_bytes(extra, "big") + 1, at + 2
    else:
        size = 192 if code == 1 else 144 << code if code < 6 else 1 << code
    at += {12: 1, 13: 2, 14: 2}.get(head[2] & 15, 0)
    crc = 0
    for byte in head[:at]:
        crc = _CRC8[crc ^ byte]
    if len(head) <= at or head[at] != crc:
        return None
    return number + size if head[1] & 1 else number * fixed + size


def _coded_number(head: bytes, at: int) -> tuple[int | None, int]:
    """The frame or sample number, coded like a character in UTF-8, and the position after it."""
    first = head[at]
    if first < 0x80:
        return first, at + 1
    count = 8 - (first ^ 0xFF).bit_length() - 1
    more = head[at + 1 : at + 1 + count]
    if not 1 <= count <= 6 or len(more) < count or any(byte >> 6 != 2 for byte in more):
        return None, at
    number = first & (0x3F >> count)
    for byte in more:
        number = number << 6 | byte & 0x3F
    return number, at + 1 + count
