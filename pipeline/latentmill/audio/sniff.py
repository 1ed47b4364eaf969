"""Finds the format of a file from its first bytes; the extension of its name is not used."""

from __future__ import annotations

from dataclasses import dataclass

from latentmill.audio.formats import by_magic, not_audio
from latentmill.audio.frames import (
    first_ac3,
    first_mpeg,
    id3_size,
    is_transport_stream,
    xing_header,
)
from latentmill.audio.media import MediaFile
from latentmill.errors import ItemError

_HEAD = 4096
_MPEG_SEARCH = 128 << 10
_MAX_ZEROS = 16 << 20
_MAX_TAGS = 64  # limit that real files do not reach; a tag may have only ten bytes


@dataclass(frozen=True)
class Sniffed:
    """The format of a file.

    Attributes:
        format: A name in `formats.FORMATS`.
        offset: Bytes of ID3v2 tags before the audio.
        has_length: False if the format can store its length in samples but this file does not: an
            MP3 without a Xing or Info header, a FLAC of unknown length.
        end: The byte after the audio of an MP3 according to that header; None if unknown.
    """

    format: str
    offset: int = 0
    has_length: bool = True
    end: int | None = None


def sniff(media: MediaFile) -> Sniffed:
    """Find the format of `media`.

    Raises:
        ItemError: The file is empty or has an unknown format.
    """
    if media.size == 0:
        raise ItemError("the file is empty (0 bytes)")
    offset = _skip_id3(media)
    head = media.read_at(offset, _HEAD)
    if name := by_magic(head):
        return Sniffed(name, offset)
    if head.startswith(b"OggS"):
        return Sniffed(_ogg_codec(head), offset)
    if head.startswith(b"fLaC"):
        # STREAMINFO is the first metadata block (RFC 9639, section 8.2).
        samples = int.from_bytes(head[21:26], "big") & 0xF_FFFF_FFFF
        return Sniffed("flac", offset, has_length=samples > 0)
    if other := not_audio(head):
        raise ItemError(f"not a known audio format: it is {other}")
    if is_transport_stream(head):
        return Sniffed("mpegts", offset)
    if frame := first_ac3(head, size=media.size - offset):
        return Sniffed(frame.format, offset)
    if found := _mpeg(media, offset):
        return found
    if not head:
        raise ItemError("the file has no audio after its ID3 tag")
    raise ItemError(f"not a known audio format (its first bytes are {head[:8].hex(' ')})")


def _mpeg(media: MediaFile, offset: int) -> Sniffed | None:
    """MPEG audio or ADTS AAC, perhaps after zeros and other bytes that are not audio."""
    zeros = _zeros(media, offset)
    data = media.read_at(offset + zeros, _MPEG_SEARCH)
    frame = first_mpeg(data, size=media.size - offset - zeros)
    if frame is None:
        return None
    if frame.format == "aac":
        return Sniffed("aac", offset)
    stated = xing_header(data, frame.start)
    if stated is None:
        return Sniffed("mp3", offset, has_length=False)
    size = stated[1]
    end = None if size is None else offset + zeros + frame.start + size
    return Sniffed("mp3", offset, end=end)


def _zeros(media: MediaFile, offset: int) -> int:
    """Number of zero bytes from `offset` on; some encoders write hundreds of thousands."""
    count = 0
    while count < _MAX_ZEROS and (piece := media.read_at(offset + count, _MPEG_SEARCH)):
        kept = len(piece.lstrip(b"\0"))
        count += len(piece) - kept
        if kept:
            break
    return count


def _ogg_codec(head: bytes) -> str:
    """The format by the first packet; `ogg` for other codecs (video, skeleton)."""
    payload = head[27 + head[26] :] if len(head) > 27 else b""
    codecs = {b"\x01vorbis": "vorbis", b"OpusHead": "opus", b"\x7fFLAC": "flac"}
    for magic, codec in codecs.items():
        if payload.startswith(magic):
            return f"ogg-{codec}"
    return "ogg"


def _skip_id3(media: MediaFile) -> int:
    """Bytes of the ID3v2 tags at the start."""
    offset = 0
    for _ in range(_MAX_TAGS):
        size = id3_size(media.read_at(offset, 10))
        if not size:
            break
        offset += size
    return offset
