"""Finds damage in the bytes of a file before it is loaded, because decoders skip it silently."""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace
from functools import lru_cache

from latentmill.audio import flac, mp3, vorbis
from latentmill.audio.headers import mpeg_in_wav
from latentmill.audio.media import MediaFile
from latentmill.audio.ogg import find_damage
from latentmill.audio.sniff import Sniffed

_MISCOUNT = 2
"""Number of MP3 frames that some encoders count but do not write."""


@dataclass(frozen=True)
class Survey:
    """Result of a survey.

    Attributes:
        damage: Description of damage; None if none was found.
        plain: Whether libsndfile loads the whole file correctly.
        frames: The frames of an MP3.
        dropped: For Vorbis, the number of samples that libvorbis drops at the end of the first
            page, and the sample after them.
        last_seek: For Vorbis, the last sample that libsndfile can seek to.
        skipped: Number of samples before the first one in a FLAC that was split.
        counted: Whether the header of a FLAC counts all of its samples.
    """

    damage: str | None = None
    plain: bool = True
    frames: mp3.Frames | None = None
    dropped: tuple[int, int] = (0, 0)
    last_seek: int = 0
    skipped: int = 0
    counted: bool = True


NOTHING = Survey()


def survey(media: MediaFile, sniffed: Sniffed) -> Survey:
    """Survey a file, if its format hides damage; results of the last files are cached."""
    if sniffed.format not in ("mp3", "flac", "wav") and not sniffed.format.startswith("ogg"):
        return NOTHING
    stat = os.fstat(media.fileno())
    return _survey(
        _File((stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns), sniffed, media)
    )


@dataclass(frozen=True)
class _File:
    """Cache key: files are equal if their identities and formats are."""

    identity: tuple[int, ...]
    sniffed: Sniffed
    media: MediaFile = field(compare=False)


@lru_cache(maxsize=64)
def _survey(file: _File) -> Survey:
    media, sniffed = file.media, file.sniffed
    if sniffed.format == "mp3":
        return _mp3(media, sniffed.offset)
    if sniffed.format == "wav":
        place = mpeg_in_wav(media)
        if place is None:
            return NOTHING
        frames = mp3.read_frames(media, *place)
        return Survey(_mp3_damage(media, frames) if frames else None, plain=False, frames=frames)
    if sniffed.format == "flac":
        return _flac(media, sniffed.offset)
    return _ogg(media, sniffed)


def survey_ends(media: MediaFile, sniffed: Sniffed) -> Survey:
    """Whether the header counts all samples, by the first and last bytes alone."""
    if sniffed.format == "flac":
        return _flac_ends(media, sniffed.offset)
    if sniffed.format == "mp3" and sniffed.has_length:
        end = sniffed.end
        return Survey(plain=end is not None and mp3.only_tags_follow(media, sniffed.offset, end))
    return NOTHING


def _flac_ends(media: MediaFile, offset: int) -> Survey:
    first, whole = flac.first_sample(media, offset), flac.ends_as_stated(media, offset)
    return Survey(plain=whole and not first, skipped=first, counted=whole)


def _flac(media: MediaFile, offset: int) -> Survey:
    found = _flac_ends(media, offset)
    damage, kind, joined = None, flac.sample_format(media, offset), False
    for at in flac.other_streams(media, offset):
        joined, other = True, flac.sample_format(media, at)
        if other != kind and damage is None:
            one, two = ("{} Hz, {} channels, {} bits".format(*each) for each in (kind, other))
            damage = f"joined: at byte {at} a FLAC stream of {two} follows one of {one}"
    # A file that ends before its header says is truncated.
    longer = joined or (not found.counted and flac.ends_later(media, offset))
    return replace(found, damage=damage, plain=found.plain and not joined, counted=not longer)


def _ogg(media: MediaFile, sniffed: Sniffed) -> Survey:
    damage = find_damage(media, sniffed.offset)
    start = None
    if sniffed.format == "ogg-vorbis" and not damage:
        start = vorbis.read_start(media, sniffed.offset)
    if start is None:
        return Survey(damage)
    if start.dropped:
        return Survey(plain=False, dropped=(start.dropped, start.samples))
    return Survey(last_seek=vorbis.last_safe_seek(media, start))


def _mp3(media: MediaFile, offset: int) -> Survey:
    frames = mp3.read_frames(media, offset)
    if frames is None:
        return Survey()
    plain = frames.lost == 0
    if frames.stated_end is not None:
        # If much data follows the audio, FFmpeg ignores the header.
        size = frames.stated_end - frames.first
        plain = plain and media.size - frames.stated_end <= size >> 4
    return Survey(_mp3_damage(media, frames), plain=plain, frames=frames)


def _mp3_damage(media: MediaFile, frames: mp3.Frames) -> str | None:
    start = 0 if frames.stated is None else 1
    if frames.gaps:
        gap = frames.gaps[0]
        at = (gap.frames - start) * frames.samples
        return (
            f"truncated or damaged: loading stopped at sample {at}"
            f", {gap.size} bytes at byte {gap.start} are not MPEG audio"
        )
    lost, there = frames.lost or 0, (frames.count - start) * frames.samples
    end = frames.stated_end
    whole = end is not None and end <= media.size and not frames.incomplete
    # The bytes in the header cover frames, and tags with some encoders.
    whole = whole and (frames.end >= (end or 0) or mp3.tag_size(media, frames.end) > 0)
    if lost > (_MISCOUNT if whole else 0) and frames.stated is not None:
        stated = frames.stated * frames.samples
        return f"truncated: the header states {stated} samples, {there} could be loaded"
    if frames.other is not None:
        return (
            f"damaged or joined: at byte {frames.other} MPEG audio of another sample rate or layer "
            "follows"
        )
    return None
