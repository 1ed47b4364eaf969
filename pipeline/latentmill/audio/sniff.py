"""Which format a file is in, from its first bytes; the name's extension is never asked."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

from latentmill.audio.media import MediaFile
from latentmill.errors import ItemError

_HEAD = 4096
_MPEG_SEARCH = 128 << 10
_MAX_TAGS = 64  # no real file has more; one of nothing else would be walked ten bytes at a time


@dataclass(frozen=True)
class Sniffed:
    """What the first bytes say.

    Attributes:
        format: `wav`, `rf64`, `w64`, `aiff`, `au`, `caf`, `flac`, `ogg-vorbis`, `ogg-opus`,
            `ogg-flac`, `ogg`, `mp3`, `aac`, `mp4`, `matroska` or `wavpack`.
        offset: Bytes of ID3v2 tags in front of the audio.
        has_length: False where this format can carry its length in samples and this file does
            not: an MP3 without a Xing or Info header, a FLAC of unknown length.
        counted_bytes: The end of the audio's bytes in the file as a Xing header counts them.
    """

    format: str
    offset: int = 0
    has_length: bool = True
    counted_bytes: int | None = None


def sniff(media: MediaFile) -> Sniffed:
    """Find the format of `media`.

    Raises:
        ItemError: The file is empty or in no known format.
    """
    if media.size == 0:
        raise ItemError("the file is empty (0 bytes)")
    offset = _skip_id3(media)
    head = media.read_at(offset, _HEAD)
    if name := _by_magic(head):
        return Sniffed(name, offset)
    if head.startswith(b"OggS"):
        return Sniffed(_ogg_codec(head), offset)
    if head.startswith(b"fLaC"):
        return Sniffed("flac", offset, has_length=_flac_samples(head) > 0)
    if found := _mpeg(media, offset):
        return found
    if not head:
        raise ItemError("there is no audio after the file's ID3 tag")
    raise ItemError(f"not a known audio format (its first bytes are {head[:8].hex(' ')})")


def _by_magic(head: bytes) -> str | None:
    if head[:4] in (b"RIFF", b"RIFX") and head[8:12] == b"WAVE":
        return "wav"
    if head[:4] in (b"RF64", b"BW64") and head[8:12] == b"WAVE":
        return "rf64"
    if head[:4] == b"FORM" and head[8:12] in (b"AIFF", b"AIFC"):
        return "aiff"
    if head[4:8] in (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip"):
        return "mp4"
    magics = {
        b"riff\x2e\x91\xcf\x11\xa5\xd6\x28\xdb": "w64",
        b"caff": "caf",
        b".snd": "au",
        b"dns.": "au",
        b"\x1a\x45\xdf\xa3": "matroska",
        b"wvpk": "wavpack",
    }
    return next((name for magic, name in magics.items() if head.startswith(magic)), None)


def _ogg_codec(head: bytes) -> str:
    """The codec of the first page's packet; another (video, skeleton) gives plain `ogg`."""
    payload = head[27 + head[26] :] if len(head) > 27 else b""
    codecs = {b"\x01vorbis": "vorbis", b"OpusHead": "opus", b"\x7fFLAC": "flac"}
    for magic, codec in codecs.items():
        if payload.startswith(magic):
            return f"ogg-{codec}"
    return "ogg"


def _flac_samples(head: bytes) -> int:
    """Total samples by STREAMINFO, the first metadata block (RFC 9639, section 8.2)."""
    return int.from_bytes(head[21:26].rjust(5, b"\0"), "big") & 0xF_FFFF_FFFF


def _skip_id3(media: MediaFile) -> int:
    """Bytes of the ID3v2 tags at the start (ID3v2.4, section 3.1)."""
    offset = 0
    for _ in range(_MAX_TAGS):
        header = media.read_at(offset, 10)
        if header[:3] != b"ID3" or len(header) < 10:
            break
        size = 0
        for byte in header[6:]:
            size = size << 7 | byte & 0x7F
        footer = 10 if header[5] & 0x10 else 0
        offset += 10 + size + footer
    return offset


# Bit rates in kbit/s of MPEG-1 layers I, II, III and MPEG-2/2.5 layers I, II/III (ISO 11172-3,
# 13818-3); index 0 is "free", which no common encoder writes.
_RATES = {
    (1, 1): (32, 64, 96, 128, 160, 192, 224, 256, 288, 320, 352, 384, 416, 448),
    (1, 2): (32, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384),
    (1, 3): (32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
    (2, 1): (32, 48, 56, 64, 80, 96, 112, 128, 144, 160, 176, 192, 224, 256),
    (2, 2): (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
    (2, 3): (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
}


@dataclass(frozen=True)
class _Frame:
    """An MPEG audio or ADTS frame: its length in bytes, and what stays equal in a stream."""

    format: str
    length: int
    side_info: int
    same: tuple[int, ...]


def _mpeg(media: MediaFile, offset: int) -> Sniffed | None:
    """MP3 (or layers I and II) and ADTS AAC: two headers, one frame apart, are the proof."""
    data = media.read_at(offset, _MPEG_SEARCH)
    for start in _sync_words(data):
        first = _frame(data, start)
        if first is None:
            continue
        end = start + first.length
        second = _frame(data, end)
        alone = offset + end == media.size
        if alone or (second is not None and second.same == first.same):
            if first.format == "aac":
                return Sniffed("aac", offset)
            return _with_xing(data, offset, start, first)
    return None


def _sync_words(data: bytes) -> Iterator[int]:
    start = data.find(b"\xff")
    while start >= 0:
        yield start
        start = data.find(b"\xff", start + 1)


def _frame(data: bytes, start: int) -> _Frame | None:
    head = data[start : start + 6]
    if len(head) < 6 or head[0] != 0xFF or head[1] & 0xE0 != 0xE0:
        return None
    if head[1] & 0xF6 == 0xF0:  # ADTS: 12 sync bits, layer 0
        length = (head[3] & 3) << 11 | head[4] << 3 | head[5] >> 5
        rate = head[2] >> 2 & 15
        return _Frame("aac", length, 0, (rate, head[3] >> 6)) if length > 7 and rate < 13 else None
    version, layer = {3: 1, 2: 2, 0: 3}.get(head[1] >> 3 & 3), 4 - (head[1] >> 1 & 3)
    rate_index, hz_index = head[2] >> 4, head[2] >> 2 & 3
    if version is None or layer == 4 or rate_index in (0, 15) or hz_index == 3:
        return None
    bit_rate = _RATES[min(version, 2), layer][rate_index - 1] * 1000
    hz = (44100, 48000, 32000)[hz_index] >> (version - 1)
    padding = head[2] >> 1 & 1
    if layer == 1:
        length = (12 * bit_rate // hz + padding) * 4
    else:
        length = (72 if layer == 3 and version > 1 else 144) * bit_rate // hz + padding
    mono = head[3] >> 6 == 3
    side_info = (17 if mono else 32) if version == 1 else (9 if mono else 17)
    return _Frame("mp3", length, side_info, (version, layer, hz_index))


def _with_xing(data: bytes, offset: int, start: int, frame: _Frame) -> Sniffed:
    """Read the Xing or Info header in the first frame: flags, frames, bytes."""
    at = start + 4 + frame.side_info
    if data[at : at + 4] not in (b"Xing", b"Info") or len(data) < at + 16:
        return Sniffed("mp3", offset, has_length=False)
    flags, frames, count = struct.unpack_from(">III", data, at + 4)
    has_length = bool(flags & 1) and frames > 0
    counted = offset + start + count if flags & 3 == 3 else None
    return Sniffed("mp3", offset, has_length, counted)
