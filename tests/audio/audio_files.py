"""Test recordings in every format, as bytes, written with the libraries' own encoders."""

from __future__ import annotations

import io
import tempfile
from functools import cache
from pathlib import Path

import av
import numpy as np
import soundfile as sf

RATE = 44100
SECONDS = 2
SOUNDFILE = {
    "wav": ("WAV", "PCM_16"),
    "wav-float": ("WAV", "FLOAT"),
    "wav-24": ("WAVEX", "PCM_24"),
    "rf64": ("RF64", "PCM_16"),
    "w64": ("W64", "PCM_16"),
    "aiff": ("AIFF", "PCM_16"),
    "au": ("AU", "PCM_16"),
    "caf": ("CAF", "PCM_16"),
    "flac": ("FLAC", "PCM_16"),
    "vorbis": ("OGG", "VORBIS"),
    "mp3": ("MP3", "MPEG_LAYER_III"),
}
PYAV = {
    "m4a": ("aac", "mp4", {}),
    "m4a-faststart": ("aac", "mp4", {"movflags": "+faststart"}),
    "alac": ("alac", "mp4", {}),
    "adts": ("aac", "adts", {}),
    "opus": ("libopus", "ogg", {}),
    "webm": ("libopus", "webm", {}),
    "ogg-flac": ("flac", "ogg", {}),
    "mp3-without-xing": ("libmp3lame", "mp3", {"write_xing": "0"}),
    "wavpack": ("wavpack", "wv", {}),
}
ALL = [*SOUNDFILE, *PYAV]


def rate_of(kind: str) -> int:
    return 48000 if kind in ("opus", "webm") else RATE


def music(num_samples: int, rate: int = RATE) -> np.ndarray:
    """Stereo `[n, 2]`, float32: a tone and noise, the right channel softer and delayed."""
    noise = np.random.default_rng(7).standard_normal(num_samples)
    left = 0.3 * np.sin(2 * np.pi * 440 * np.arange(num_samples) / rate) + 0.05 * noise
    return np.stack([left, 0.5 * np.roll(left, 100)], axis=1).astype(np.float32)


@cache
def encoded(kind: str, num_samples: int | None = None) -> bytes:
    """`music` in the format `kind`, one of ALL."""
    rate = rate_of(kind)
    signal = music(num_samples or SECONDS * rate, rate)
    if kind in SOUNDFILE:
        container, subtype = SOUNDFILE[kind]
        return sound(signal, rate, container, subtype)
    return with_pyav(signal, rate, *PYAV[kind])


def sound(signal: np.ndarray, rate: int, container: str = "WAV", subtype: str = "FLOAT") -> bytes:
    """Any signal `[n]` or `[n, C]` through soundfile."""
    target, channels = io.BytesIO(), 1 if signal.ndim == 1 else signal.shape[1]
    with sf.SoundFile(target, "w", rate, channels, subtype, format=container) as output:
        for start in range(0, len(signal), 65536):  # a minute of Vorbis at once overruns the stack
            output.write(signal[start : start + 65536])
    return target.getvalue()


def with_pyav(
    signal: np.ndarray,
    rate: int,
    codec: str,
    container: str,
    options: dict[str, str],
    *,
    layout: str = "stereo",
    sample: str | None = None,
) -> bytes:
    """Any signal `[n, C]` through FFmpeg; `sample` is the encoder's sample format."""
    with tempfile.NamedTemporaryFile() as target:  # +faststart reads back what it wrote
        with av.open(target.name, "w", format=container, options=options) as output:
            stream = output.add_stream(codec, rate=rate)
            stream.layout = layout
            stream.format = sample or stream.format
            for start in range(0, len(signal), 4096):
                part = np.ascontiguousarray(signal[start : start + 4096]).reshape(1, -1)
                frame = av.AudioFrame.from_ndarray(part, format="flt", layout=layout)
                frame.sample_rate, frame.pts = rate, start
                output.mux(stream.encode(frame))
            output.mux(stream.encode(None))
        return Path(target.name).read_bytes()
