"""Finds and repairs damage in MPEG audio: bytes that belong to no frame.

Decoders skip such bytes without an error, so everything after them comes too early. `repair`
replaces lost frames with silent ones.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass, replace

from latentmill.audio.frames import id3_size, mpeg_headers, side_info_size, xing_header
from latentmill.audio.media import MediaFile, media_from_bytes

_WINDOW = 1 << 20
_LONGEST = 4608  # bytes; frames are shorter at any bit rate
_TAIL = 1 << 17


@dataclass(frozen=True)
class Gap:
    """Bytes between two frames that are neither a frame nor a tag.

    Attributes:
        start: Position of the first one in the file.
        size: Number of bytes.
        frames: Number of frames before them.
    """

    start: int
    size: int
    frames: int


@dataclass(frozen=True)
class Frames:
    """The frames of a file.

    Attributes:
        count: Number of frames, including a Xing or Info frame.
        first: Position of the first frame.
        end: The byte after the last frame.
        incomplete: Whether the last frame is incomplete.
        samples: Samples per channel of a frame.
        gaps: Lost or damaged bytes.
        other: Position after the last frame where frames of another sample rate or layer begin.
        stated: Number of frames according to a Xing, Info or VBRI header, without its own frame;
            None without a header.
        stated_end: The byte after the audio according to that header.
    """

    count: int
    first: int
    end: int
    incomplete: bool
    samples: int
    gaps: tuple[Gap, ...]
    other: int | None = None
    stated: int | None = None
    stated_end: int | None = None

    @property
    def lost(self) -> int | None:
        """Number of frames missing according to the header; negative if there are more."""
        return None if self.stated is None else self.stated + 1 - self.count


def read_frames(media: MediaFile, offset: int, end: int | None = None) -> Frames | None:
    """Read the frames after `offset`; None if there are none."""
    stop = media.size if end is None else min(end, media.size)
    frames = _Walk(media, offset, stop).run()
    if frames is None:
        return None
    data = media.read_at(frames.first, 64)
    stated = _vbri_header(data) or xing_header(data, 0)
    if stated is None:
        return frames
    count, size = stated
    end = None if size is None else frames.first + size
    return replace(frames, stated=count, stated_end=end)


def only_tags_follow(media: MediaFile, offset: int, end: int) -> bool:
    """Whether no audio follows `end`, the byte after the audio according to the header."""
    at = end
    while size := tag_size(media, at):
        at += size
    following = media.read_at(at, 2)
    frame = following[:1] == b"\xff" and following[1:] >= b"\xe0"
    return not frame and media.size - end <= min(end - offset >> 4, _TAIL)


def _vbri_header(data: bytes) -> tuple[int, int] | None:
    """Frames and bytes by the header of Fraunhofer's encoders."""
    if data[36:40] != b"VBRI" or len(data) < 54:
        return None
    size, count = struct.unpack_from(">II", data, 46)
    return (count, size) if count else None


class _Walk:
    def __init__(self, media: MediaFile, at: int, stop: int) -> None:
        self._media, self._at, self._stop = media, at, stop
        self._base, self._heads = at, mpeg_headers(media.read_at(at, _WINDOW))

    def run(self) -> Frames | None:
        begin, first = self._at, self._resync()
        if first is None:
            return None
        kind = self._head(first)[1]
        if self._head(begin)[1] == kind:  # the data after the first frame is damaged
            first = begin
        self._at = first
        count, gaps, end, incomplete, other = 0, list[Gap](), first, False, None
        while self._at + 4 <= self._stop:
            length, found = self._head(self._at)
            if length and found == kind:
                count, incomplete = count + 1, self._at + length > self._stop
                self._at = end = min(self._at + length, self._stop)
            elif size := tag_size(self._media, self._at):
                self._at += size
            else:
                start = self._at
                place = self._resync(kind)
                if place is None:
                    self._at = start
                    other = self._resync()
                    break
                self._at = place
                gaps.append(Gap(start, place - start, count))
        count -= incomplete
        samples = _samples(kind)
        return Frames(count, first, end, incomplete, samples, tuple(gaps), other)

    def _head(self, at: int) -> tuple[int, int]:
        """Length and kind of the frame at `at`; zeros if there is none."""
        if at < self._base or at + 4 > self._base + _WINDOW:
            self._base = at
            self._heads = mpeg_headers(self._media.read_at(at, _WINDOW))
        return self._heads.get(at - self._base, (0, 0))

    def _resync(self, kind: int | None = None) -> int | None:
        """The position of the next frame that is followed by another one."""
        base = self._at
        while base + 4 <= self._stop:
            known = base == self._base  # as at the start of the file
            heads = self._heads if known else mpeg_headers(self._media.read_at(base, _WINDOW))
            for at in heads:
                place = base + at
                if place + 4 > self._stop:
                    break
                length, found = self._head(place)
                if kind in (None, found) and self._followed(place + length, found):
                    return place
            base += _WINDOW - 3
        return None

    def _followed(self, at: int, kind: int) -> bool:
        if at == self._stop or self._head(at)[1] == kind:
            return True
        return bool(tag_size(self._media, at))


def tag_size(media: MediaFile, at: int) -> int:
    """Bytes of the tag that begins at `at`, between frames; 0 if there is none."""
    head = media.read_at(at, 32)
    if head.startswith(b"TAG"):
        return 128
    if size := id3_size(head):
        return size
    if head.startswith(b"APETAGEX") and len(head) == 32:
        return int.from_bytes(head[12:16], "little") + (32 if head[23] & 0x20 else 0)
    if head.startswith(b"LYRICSBEGIN"):
        text = media.read_at(at, 1 << 16)
        ends = [text.find(mark) for mark in (b"LYRICS200", b"LYRICSEND")]
        return max((end + 9 for end in ends if end > 0), default=0)
    return 0


def _samples(kind: int) -> int:
    version, layer = kind >> 4, kind >> 2 & 3
    if layer == 1:
        return 384
    return 576 if layer == 3 and version != 3 else 1152


def repair(media: MediaFile, frames: Frames, *, bare: bool = False) -> MediaFile:
    """A copy of the file with silent frames in place of lost ones, so the others keep their time.

    Frames after a gap whose bits begin in a lost frame become silent, too. The number of lost
    frames comes from a header that counts frames, or else from the size of the gaps. With `bare`,
    data around the frames, such as a WAV header, is left out.
    """
    mean = max(1.0, (frames.end - frames.first - sum(g.size for g in frames.gaps)) / frames.count)
    fills = [max(gap.size * 4 > mean, round(gap.size / mean)) for gap in frames.gaps]
    lost = frames.lost
    if lost == 0:
        fills = [0] * len(fills)  # bytes were inserted
    elif lost is not None and 0 < lost <= frames.count:  # a damaged header may have any number
        largest = max(range(len(fills)), key=lambda index: frames.gaps[index].size)
        fills[largest] = max(0, fills[largest] + lost - sum(fills))
    pieces, at = [], frames.first if bare else 0
    for gap, fill in zip(frames.gaps, fills, strict=True):
        pieces.append(media.read_at(at, gap.start - at))
        at = gap.start + gap.size
        head, length = _silent_header(media.read_at(at, 4))
        pieces.append((head + bytes(length - 4)) * fill)
        for piece in _without_lost_bits(media, at, frames.end):
            pieces.append(piece)
            at += len(piece)
    pieces.append(media.read_at(at, (frames.end if bare else media.size) - at))
    return media_from_bytes(b"".join(pieces), "repaired")


def _silent_header(head: bytes) -> tuple[bytes, int]:
    """The header without a checksum, and the length of its frame."""
    head = bytes((head[0], head[1] | 1, *head[2:4]))
    return head, mpeg_headers(head + b"\0")[0][0]


def _without_lost_bits(media: MediaFile, at: int, end: int) -> Iterator[bytes]:
    """The layer III frames from `at` on whose bits begin before `at`, as silent frames."""
    there = 0
    while at < end:
        data = media.read_at(at, _LONGEST)
        length, kind = mpeg_headers(data[:5]).get(0, (0, 0))
        if not length or kind >> 2 & 3 != 3:
            return
        new, side = kind >> 4 != 3, side_info_size(data)
        body = 4 if data[1] & 1 else 6
        begin = data[body] if new else data[body] << 1 | data[body + 1] >> 7
        if begin <= there:
            return
        there += length - body - side
        head, _ = _silent_header(data[:4])
        yield head + bytes(side + body - 4) + data[body + side : length]
        at += length
