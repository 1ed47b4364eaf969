"""Opens a file as a stream of samples: chooses the decoder for its format."""

from __future__ import annotations

import contextlib
import dataclasses

from latentmill.audio.headers import Shortage, find_shortage
from latentmill.audio.media import MediaFile
from latentmill.audio.mp3 import repair
from latentmill.audio.segment import SegmentDecoder
from latentmill.audio.sniff import Sniffed, sniff
from latentmill.audio.stream import (
    KEEP_HINT,
    AudioInfo,
    AudioStream,
    DecodeError,
    Decoder,
    truncated,
)
from latentmill.audio.survey import Survey, survey, survey_ends
from latentmill.audio.with_ogg import OggPageDecoder
from latentmill.audio.with_pyav import PyAVDecoder
from latentmill.audio.with_soundfile import SoundFileDecoder
from latentmill.errors import ItemError

_SOUNDFILE_FORMATS = ("wav", "rf64", "w64", "aiff", "au", "caf", "flac", "ogg-vorbis", "mp3")

_PAGED = ("ogg-opus", "ogg-vorbis", "ogg-flac")


def open_audio(
    media: MediaFile,
    *,
    start: float = 0.0,
    duration: float | None = None,
    allow_truncated: bool = False,
    time_limit: float | None = None,
) -> AudioStream:
    """Open a recording for loading.

    The stream reads from `media`, which must stay open until it is exhausted or closed.

    Args:
        media: The file. One stream at a time may be open on it.
        start: Start of the part of the recording to load, in seconds.
        duration: Length of the part, in seconds; None: to the end.
        allow_truncated: Load the readable part of a truncated or damaged file.
        time_limit: Seconds that loading may take, in addition to the length of the loaded audio.
            It is checked between blocks, so it does not interrupt a decoder that hangs.

    Raises:
        ItemError: The file is empty, of an unknown format, truncated (unless allowed), cannot be
            loaded, or its header is invalid.
    """
    media.read_if_small()
    sniffed = sniff(media)
    found = survey(media, sniffed)
    if found.damage and not allow_truncated:
        raise ItemError(f"{found.damage} {KEEP_HINT}")
    repaired = None
    if found.frames and found.frames.gaps:
        media = repaired = repair(media, found.frames, bare=sniffed.format == "wav")
        sniffed = sniff(media)
    shortage = find_shortage(media, sniffed)
    decoder = _open_decoder(media, sniffed, found, shortage, keep=allow_truncated)
    try:
        stated = _checked(decoder, shortage)
        if shortage and not allow_truncated:
            raise ItemError(_truncated_at_open(shortage, decoder.info))
        info = decoder.info = stated
        if start > 0 or duration is not None:
            decoder = SegmentDecoder(decoder, info, start, duration)
    except ItemError:
        decoder.close()
        raise
    return AudioStream(
        decoder, repaired=repaired, allow_truncated=allow_truncated, time_limit=time_limit
    )


def probe(media: MediaFile) -> AudioInfo:
    """Read rate, channels, length and codec of a recording from its header.

    The length is unknown if the end of the file shows that the header does not count all samples,
    as in joined MP3 or FLAC files.

    Raises:
        ItemError: See `open_audio`; truncated files are not an error here.
    """
    sniffed = sniff(media)
    shortage = find_shortage(media, sniffed)
    found = survey_ends(media, sniffed)
    decoder = _open_decoder(media, sniffed, found, shortage, keep=False)
    try:
        return _checked(decoder, shortage)
    finally:
        decoder.close()


def _checked(decoder: Decoder, shortage: Shortage | None) -> AudioInfo:
    """The checked header; for a truncated file, with the length that its header gives."""
    info = decoder.info
    info.check()
    if shortage and shortage.num_samples:
        return dataclasses.replace(info, num_samples=shortage.num_samples)
    return info


def _open_decoder(
    media: MediaFile, sniffed: Sniffed, found: Survey, shortage: Shortage | None, *, keep: bool
) -> Decoder:
    """Open `media` in libsndfile if it reads the format correctly, or else in FFmpeg."""
    plain = sniffed.format in _SOUNDFILE_FORMATS and sniffed.has_length and found.plain
    if keep and (sniffed.format == "flac" or (found.damage and sniffed.format != "mp3")):
        plain = False  # libsndfile does not report where it continues after damage
    try:
        if plain:
            with contextlib.suppress(DecodeError):
                return SoundFileDecoder(media, sniffed, found)
        paged = keep and found.damage and sniffed.format in _PAGED
        return (OggPageDecoder if paged else PyAVDecoder)(media, sniffed, found, keep=keep)
    except DecodeError as error:
        if shortage:
            raise ItemError(f"truncated: {shortage.text}; nothing can be loaded") from error
        raise ItemError(f"cannot be loaded as {sniffed.format}: {error}") from error


def _truncated_at_open(shortage: Shortage, info: AudioInfo) -> str:
    if shortage.num_samples is None or info.num_samples is None:
        return f"truncated: {shortage.text} {KEEP_HINT}"
    return truncated(shortage.num_samples, info.num_samples)
