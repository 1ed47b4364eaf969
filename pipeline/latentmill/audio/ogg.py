"""Checks Ogg pages (RFC 3533): whether the last page exists and all pages are intact.

Decoders drop a page with a wrong checksum and continue with the next one without an error.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace

from latentmill.audio.media import MediaFile

_HEADER = 27
_MAX_PAGE = _HEADER + 255 + 255 * 255
_WINDOW = 1 << 20
_LONGEST_PACKET = 16 << 20  # bytes; only comments with large pictures are longer
_REVERSED_BITS = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))


@dataclass(frozen=True)
class Page:
    """A page. `granule` is the number of samples up to its end, or -1 if no packet ends on it.

    `whole` is whether its checksum is correct; True if the checksum was not compared.
    """

    flags: int
    granule: int
    serial: int
    sequence: int
    checksum: int
    data: bytes
    whole: bool = True


def find_truncation(media: MediaFile) -> str | None:
    """What is wrong with the last page (truncated or not marked as the last), or None."""
    tail = media.read_at(max(0, media.size - 2 * _MAX_PAGE), 2 * _MAX_PAGE)
    at = tail.rfind(b"OggS\0")
    if at < 0:
        return "there is no Ogg page near the end"
    page = _page(tail, at)
    if page is None:
        return "the last Ogg page is truncated"
    return None if page.flags & 4 else "the Ogg stream ends without its last page"


@dataclass(frozen=True)
class Packets:
    """The headers of a stream and the packets that end on its first page with audio."""

    headers: list[bytes]
    packets: list[bytes]
    granule: int
    ends: bool


def first_packets(media: MediaFile, offset: int, headers: int) -> Packets | None:
    """The first packets of the first stream; None if it ends before its audio."""
    serial, heads, rest = None, list[bytes](), bytearray()
    for _, page in _pages(media, offset):
        serial = page.serial if serial is None else serial
        if page.serial != serial:
            continue
        packets = packets_of(page, rest)
        missing = headers - len(heads)
        heads, packets = heads + packets[:missing], packets[missing:]
        if packets:
            return Packets(heads, packets, page.granule, bool(page.flags & 4))
    return None


def last_granules(media: MediaFile) -> list[int]:
    """The granule positions of the last pages on which a packet ends."""
    start = max(0, media.size - 4 * _MAX_PAGE)
    tail, found = media.read_at(start, 4 * _MAX_PAGE), []
    at = tail.find(b"OggS\0")
    while at >= 0:
        if (page := _page(tail, at)) and _checksum(page.data) == page.checksum:
            found.append(page.granule)
        at = tail.find(b"OggS\0", at + 1)
    return [granule for granule in found if granule >= 0]


def packets_of(page: Page, rest: bytearray) -> list[bytes]:
    """The packets that end on a page.

    `rest` is the beginning of the first one, from earlier pages, and then that of the next one. A
    packet longer than `_LONGEST_PACKET` is not kept whole.
    """
    segments = page.data[26]
    packets, start = [], _HEADER + segments
    end = start
    for size in page.data[_HEADER:start]:
        end += size
        if size < 255:
            packets.append(bytes(rest) + page.data[start:end])
            rest.clear()
            start = end
    if len(rest) < _LONGEST_PACKET:
        rest += page.data[start:end]
    return packets


def find_damage(media: MediaFile, offset: int) -> str | None:
    """The first fault after `offset` that would silently lose audio; None if there is none.

    A wrong checksum, a missing page, or a second stream after the first (chained, section 4),
    which the decoders ignore. Reads the whole file, in a few per cent of the time to load it.
    """
    expected: dict[int, int] = {}
    begun = False
    for at, page in _pages(media, offset):
        if _checksum(page.data) != page.checksum:
            return f"damaged: the Ogg page at byte {at} has a wrong checksum"
        first = bool(page.flags & 2)
        if first and begun:
            return f"chained: a second Ogg stream starts at byte {at} and would be ignored"
        begun = begun or not first
        if page.sequence != expected.get(page.serial, page.sequence):
            return f"damaged: Ogg pages are missing before byte {at}"
        expected[page.serial] = (page.sequence + 1) & 0xFFFF_FFFF
    return None


def _pages(media: MediaFile, offset: int) -> Iterator[tuple[int, Page]]:
    """Consecutive pages without a gap, each with its position."""
    start, window, at = offset, media.read_at(offset, _WINDOW), 0
    while True:
        if len(window) - at < _MAX_PAGE and start + len(window) < media.size:
            start, window, at = start + at, media.read_at(start + at, _WINDOW), 0
        page = _page(window, at)
        if page is None:
            return
        yield start + at, page
        at += len(page.data)


def all_pages(media: MediaFile) -> Iterator[Page]:
    """All pages, also after other bytes and with wrong checksums."""
    start = 0
    while window := media.read_at(start, _WINDOW):
        at = window.find(b"OggS\0")
        last = start + len(window) >= media.size
        while at >= 0 and (last or len(window) - at >= _MAX_PAGE):
            page = _page(window, at)
            whole = page is not None and _checksum(page.data) == page.checksum
            if page is not None:
                yield replace(page, whole=whole)
            at = window.find(b"OggS\0", at + (len(page.data) if page and whole else 1))
        if last:
            return
        start += at if at > 0 else len(window) - 4


def _page(data: bytes, at: int) -> Page | None:
    """The page at `at`; None if there is no complete page."""
    if not data.startswith(b"OggS\0", at) or len(data) < at + _HEADER:
        return None
    flags, granule, serial, sequence, checksum, segments = struct.unpack_from("<5xBqIIIB", data, at)
    body = at + _HEADER + segments
    end = body + sum(data[at + _HEADER : body])
    if end > len(data):
        return None
    return Page(flags, granule, serial, sequence, checksum, data[at:end])


def _checksum(page: bytes) -> int:
    """Ogg's CRC-32 (generator 0x04c11db7, most significant bit first, no inversion).

    zlib has the same generator with reversed bits, so the bits of each byte are reversed.
    """
    blank = page[:22] + b"\0\0\0\0" + page[26:]
    crc = ~zlib.crc32(blank.translate(_REVERSED_BITS), 0xFFFF_FFFF) & 0xFFFF_FFFF
    return int(f"{crc:032b}"[::-1], 2)
