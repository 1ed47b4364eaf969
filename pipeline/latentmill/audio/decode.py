"""From a file to a stream of samples: which decoder reads which format, and one retry."""

from __future__ import annotations

import dataclasses

from latentmill.audio.headers import Shortage, find_shortage
from latentmill.audio.media import MediaFile
from latentmill.audio.ogg import find_damage
from latentmill.audio.part import PartDecoder
from latentmill.audio.sniff import Sniffed, sniff
from latentmill.audio.stream import (
    KEEP_HINT,
    AudioInfo,
    AudioStream,
    DecodeError,
    Decoder,
    truncated,
)
from latentmill.audio.with_pyav import PyAVDecoder
from latentmill.audio.with_soundfile import SoundFileDecoder
from latentmill.errors import ItemError

_SOUNDFILE_FORMATS = ("wav", "rf64", "w64", "aiff", "au", "caf", "flac", "ogg-vorbis", "mp3")

_MP3_FRAME = 1152


def open_audio(
    media: MediaFile,
    *,
    start: float = 0.0,
    duration: float | None = None,
    allow_truncated: bool = False,
    time_limit: float | None = None,
) -> AudioStream:
    """Open a recording for decoding.

    The stream reads from `media`, which must stay open until it is exhausted or closed.

    Args:
        media: The file. One stream at a time may be open on it.
        start: Where the wanted part of the recording begins, in seconds.
        duration: How long it is, in seconds; None: to the end.
        allow_truncated: Deliver what can be decoded of a file that is cut off or damaged.
        time_limit: Seconds that decoding may take, on top of the length of what was decoded. It
            is looked at between blocks: what hangs inside a decoder hangs.

    Raises:
        ItemError: The file is empty, in no known format, truncated (unless allowed), or cannot
            be decoded; or its header is absurd.
    """
    sniffed = sniff(media)
    shortage = find_shortage(media, sniffed)
    decoder = _open_decoder(media, sniffed, shortage)
    try:
        info = decoder.info
        info.check()
        if shortage:
            if not allow_truncated:
                raise ItemError(_truncated_at_open(shortage, info))
            info = dataclasses.replace(info, num_samples=shortage.num_samples or info.num_samples)
        elif sniffed.format.startswith("ogg") and not allow_truncated and duration is None:
            damage = find_damage(media, sniffed.offset)
            if damage:
                raise ItemError(f"{damage} {KEEP_HINT}")
        if start > 0 or duration is not None:
            decoder = PartDecoder(decoder, info, start, duration)
            info = decoder.info
    except ItemError:
        decoder.close()
        raise
    slack = _mp3_slack(media, sniffed)
    return AudioStream(
        decoder, info, slack=slack, allow_truncated=allow_truncated, time_limit=time_limit
    )


def probe(media: MediaFile) -> AudioInfo:
    """Rate, channels, promised length and codec of a recording, without decoding it.

    Raises:
        ItemError: As `open_audio` does, but for truncation.
    """
    with open_audio(media, allow_truncated=True) as stream:
        return stream.info


def _open_decoder(media: MediaFile, sniffed: Sniffed, shortage: Shortage | None) -> Decoder:
    """Open `media` in the decoder that is right for its format, or else in FFmpeg."""
    try:
        if sniffed.format in _SOUNDFILE_FORMATS and sniffed.has_length:
            try:
                return SoundFileDecoder(media, sniffed)
            except DecodeError:
                return PyAVDecoder(media, sniffed)
        return PyAVDecoder(media, sniffed)
    except DecodeError as error:
        if shortage:
            raise ItemError(f"truncated: {shortage.text}; nothing can be decoded") from error
        raise ItemError(f"cannot be decoded as {sniffed.format}: {error}") from error


def _truncated_at_open(shortage: Shortage, info: AudioInfo) -> str:
    if shortage.num_samples is None or info.num_samples is None:
        return f"truncated: {shortage.text} {KEEP_HINT}"
    return truncated(shortage.num_samples, info.num_samples)


def _mp3_slack(media: MediaFile, sniffed: Sniffed) -> int:
    """Samples that an MP3 may lack: some encoders count the header frame, or one that they drop.

    Only where the Xing header's count of bytes proves that nothing was cut off.
    """
    counted = sniffed.counted_bytes
    whole = counted is not None and counted <= media.size
    return 2 * _MP3_FRAME if sniffed.format == "mp3" and whole else 0
