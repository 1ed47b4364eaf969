"""Reads MP4 tables (ISO 14496-12): the bytes and the number of samples that they list.

A file is complete if it contains everything that its tables list. Lengths in its headers are not
enough: they are rounded, and only some include padding.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from latentmill.audio.media import MediaFile

Numbers = NDArray[np.int64]

_MAX_BOXES = 1 << 16
_LARGEST = 1 << 28


@dataclass
class Tables:
    """Contents of the tables of all audio tracks.

    Attributes:
        end: The byte after the last sample.
        fragmented: Whether samples are in movie fragments.
        timescales: Units of time per second, by track.
        edit_timescales: The same of edit lists, by track with an edit list.
        durations: Sum of the durations of a track's samples.
        longest: The longest duration of a sample, by track.
        last: The duration of the last sample, by track.
        defaults: Duration and size of samples in fragments, by track.
    """

    end: int = 0
    fragmented: bool = False
    timescales: dict[int, int] = field(default_factory=dict)
    edit_timescales: dict[int, int] = field(default_factory=dict)
    durations: dict[int, int] = field(default_factory=dict)
    longest: dict[int, int] = field(default_factory=dict)
    last: dict[int, int] = field(default_factory=dict)
    defaults: dict[int, tuple[int, int]] = field(default_factory=dict)

    def add(self, track: int, end: int, durations: Numbers, counts: Numbers) -> None:
        """Add samples of a track."""
        self.end = max(self.end, end)
        if not len(durations):
            return
        self.longest[track] = max(self.longest.get(track, 0), int(durations.max()))
        self.last[track] = int(durations[-1])
        self.durations[track] = self.durations.get(track, 0) + int((durations * counts).sum())

    def seconds(self, track: int) -> tuple[float, float] | None:
        """Length of all samples of a track with an unshortened last sample, and of one sample."""
        if not self.timescales.get(track) or track not in self.durations:
            return None
        full = self.durations[track] + self.longest[track] - self.last[track]
        return full / self.timescales[track], self.longest[track] / self.timescales[track]


def read_tables(media: MediaFile) -> Tables | None:
    """The tables of the audio tracks; None if there are none or they are invalid."""
    tables = Tables()
    try:
        for name, at, start, end in boxes(media):
            if name == b"sidx":
                tables.end = max(tables.end, end + _referenced(media.read_at(start, end - start)))
            if name not in (b"moov", b"moof") or end - start > _LARGEST:
                continue
            data = media.read_at(start, end - start)
            if name == b"moov":
                _movie(tables, data)
            else:
                _fragment(tables, data, at)
    except (struct.error, IndexError, ValueError):
        return None
    return tables if tables.durations else None


def boxes(media: MediaFile) -> Iterator[tuple[bytes, int, int, int]]:
    """Boxes of the file: name, position, and start and end of their content."""
    at = 0
    for _ in range(_MAX_BOXES):
        head = media.read_at(at, 16)
        if len(head) < 8:
            return
        size, begin = struct.unpack(">I", head[:4])[0], at + 8
        if size == 1 and len(head) == 16:
            size, begin = struct.unpack(">Q", head[8:])[0], at + 16
        if size == 0:
            size = media.size - at
        if size < begin - at:
            return
        yield head[4:8], at, begin, at + size
        at += size


def _inner(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Boxes inside a box: name and content."""
    at = 0
    while at + 8 <= len(data):
        size, name = struct.unpack_from(">I4s", data, at)
        begin = at + 8
        if size == 1:
            size, begin = struct.unpack_from(">Q", data, at + 8)[0], at + 16
        size = size or len(data) - at
        if size < begin - at:
            return
        yield name, data[begin : at + size]
        at += size


def _at(data: bytes, *path: bytes) -> bytes:
    """The content of the first box at a path; empty if there is none."""
    for name in path:
        data = next((content for found, content in _inner(data) if found == name), b"")
    return data


def _table(data: bytes, kind: str, start: int, count: int) -> Numbers:
    return np.frombuffer(data, kind, count, start).astype(np.int64)


def _movie(tables: Tables, moov: bytes) -> None:
    for name, content in _inner(moov):
        if name == b"mvex":
            for _, trex in (box for box in _inner(content) if box[0] == b"trex"):
                track, _, duration, size = struct.unpack_from(">4x4I", trex)
                tables.defaults[track] = (duration, size)
        if name != b"trak" or _at(content, b"mdia", b"hdlr")[8:12] != b"soun":
            continue
        header, media = _at(content, b"tkhd"), _at(content, b"mdia", b"mdhd")
        track = struct.unpack_from(">I", header, 20 if header[0] else 12)[0]
        tables.timescales[track] = _timescale(media)
        if (movie := _at(moov, b"mvhd")) and _at(content, b"edts", b"elst"):
            tables.edit_timescales[track] = _timescale(movie)
        _samples(tables, track, _at(content, b"mdia", b"minf", b"stbl"))


def _timescale(header: bytes) -> int:
    """Units of time per second by an `mvhd` or `mdhd` box."""
    return int(struct.unpack_from(">I", header, 20 if header[0] else 12)[0])


def _samples(tables: Tables, track: int, stbl: bytes) -> None:
    """Add the end and the durations of a track's samples."""
    sizes, times = _at(stbl, b"stsz"), _at(stbl, b"stts")
    each, count = struct.unpack_from(">4xII", sizes)
    if not count:
        return
    entries = _table(times, ">u4", 8, 2 * struct.unpack_from(">4xI", times)[0])
    counts, durations = entries[::2], entries[1::2]
    offsets, width = (
        (_at(stbl, b"stco"), ">u4") if _at(stbl, b"stco") else (_at(stbl, b"co64"), ">u8")
    )
    places = _table(offsets, width, 8, struct.unpack_from(">4xI", offsets)[0])
    runs = _table(
        _at(stbl, b"stsc"), ">u4", 8, 3 * struct.unpack_from(">4xI", _at(stbl, b"stsc"))[0]
    )
    firsts, per_chunk = runs[::3] - 1, runs[1::3]
    repeats = np.diff(np.append(firsts, len(places)))
    last = np.cumsum(np.repeat(per_chunk, repeats))  # samples up to the end of each chunk
    last = np.minimum(last, count)
    first = np.concatenate([[0], last[:-1]])
    if each > 1:
        lengths = (last - first) * each
    elif each == 1:  # QuickTime counts bytes of PCM differently
        lengths = np.zeros(len(places), np.int64)
    else:
        bytes_before = np.concatenate([[0], np.cumsum(_table(sizes, ">u4", 12, count))])
        lengths = bytes_before[last] - bytes_before[first]
    used = last > first
    end = int((places + lengths)[used].max()) if used.any() else 0
    tables.add(track, end, durations, counts)


def _fragment(tables: Tables, moof: bytes, place: int) -> None:
    for name, content in _inner(moof):
        if name == b"traf":
            _track_fragment(tables, content, place)


def _track_fragment(tables: Tables, traf: bytes, place: int) -> None:
    header = _at(traf, b"tfhd")
    flags, track = struct.unpack_from(">II", header)
    if track not in tables.timescales:
        return
    tables.fragmented = True
    duration, size = tables.defaults.get(track, (0, 0))
    base, at = place, 8
    if flags & 1:
        base, at = struct.unpack_from(">Q", header, at)[0], at + 8
    at += 4 if flags & 2 else 0
    if flags & 8:
        duration, at = struct.unpack_from(">I", header, at)[0], at + 4
    if flags & 16:
        size = struct.unpack_from(">I", header, at)[0]
    following = base
    for name, trun in _inner(traf):
        if name != b"trun":
            continue
        run, count = struct.unpack_from(">II", trun)
        if not count:
            continue
        run, at, start = run & 0xFFFFFF, 8, following
        if run & 1:
            start, at = base + struct.unpack_from(">i", trun, at)[0], at + 4
        at += 4 if run & 4 else 0
        fields = [bit for bit in (0x100, 0x200, 0x400, 0x800) if run & bit]
        rows = _table(trun, ">u4", at, count * len(fields)).reshape(count, len(fields))
        # Samples without a field have the default; a damaged `count` may be any number.
        durations, counts, total = np.array([duration]), np.array([count]), count * size
        if run & 0x100:
            durations, counts = rows[:, fields.index(0x100)], np.ones(count, np.int64)
        if run & 0x200:
            total = int(rows[:, fields.index(0x200)].sum())
        following = start + total
        tables.add(track, following, durations, counts)


def _referenced(sidx: bytes) -> int:
    """Bytes from the end of an index to the end of the segments that it lists."""
    at = 8 + 4 + (16 if sidx[0] else 8)
    earliest = 8 if sidx[0] else 4
    first = int.from_bytes(sidx[12 + earliest : 12 + 2 * earliest], "big")
    count = struct.unpack_from(">2xH", sidx, at)[0]
    sizes = _table(sidx, ">u4", at + 4, 3 * count)[::3] & 0x7FFF_FFFF
    return first + int(sizes.sum())
