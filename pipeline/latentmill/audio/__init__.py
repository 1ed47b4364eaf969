"""Loads audio: opens a file, finds its format, loads it in blocks and converts it for a model.

    with open_media(uri) as media:
        stream = open_audio(media)
        waveform = prepare(stream, sample_rate=44100, channels=1)
        for block in waveform.blocks():  # float32 [C, n]
            ...
        waveform.stats, media.content_hash

Every error of a recording is an ItemError with one line of text without a path.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from latentmill.audio.convert import Waveform, WaveformStats, prepare
    from latentmill.audio.decode import open_audio, probe
    from latentmill.audio.media import MediaFile, media_from_bytes, open_media
    from latentmill.audio.stream import AudioInfo, AudioStream

__all__ = [
    "AudioInfo",
    "AudioStream",
    "MediaFile",
    "Waveform",
    "WaveformStats",
    "media_from_bytes",
    "open_audio",
    "open_media",
    "prepare",
    "probe",
]

_MODULES = {
    "AudioInfo": "stream",
    "AudioStream": "stream",
    "MediaFile": "media",
    "Waveform": "convert",
    "WaveformStats": "convert",
    "media_from_bytes": "media",
    "open_audio": "decode",
    "open_media": "media",
    "prepare": "convert",
    "probe": "decode",
}


def __getattr__(name: str) -> Any:
    # Importing the decoders takes half a second; commands that load no audio do not wait for it.
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
