"""Bytes to waveforms: open a file, find its format, decode it in blocks, convert it for a model.

    with open_media(uri) as media:
        stream = open_audio(media)
        waveform = prepare(stream, sample_rate=44100, channels=1)
        for block in waveform.blocks():  # float32 [C, n]
            ...
        waveform.stats, media.content_hash

Every fault of a recording is an ItemError with one line of text that names no path.
"""

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
