"""Test recordings in every format, as bytes, written with the libraries' own encoders."""

from __future__ import annotations

import io
import struct
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

# Loaded by FFmpeg, and less common: sample rate and channels, then as above.
RARE_SOUNDFILE = {
    "sph": (16000, 1, "NIST", "PCM_16"),
    "voc": (44100, 2, "VOC", "PCM_16"),
    "ircam": (44100, 2, "IRCAM", "PCM_16"),
    "svx": (22050, 1, "SVX", "PCM_S8"),
    "gsm-in-wav": (8000, 1, "WAV", "GSM610"),
}
RARE_PYAV = {
    "wma": (44100, 2, "wmav2", "asf"),
    "wma1": (44100, 2, "wmav1", "asf"),
    "ac3": (48000, 2, "ac3", "ac3"),
    "eac3": (44100, 2, "eac3", "eac3"),
    "tta": (44100, 2, "tta", "tta"),
    "amr": (8000, 1, "libopencore_amrnb", "amr"),
    "avi": (44100, 2, "pcm_s16le", "avi"),
    "avi-mp3": (44100, 2, "libmp3lame", "avi"),
    "flv": (44100, 2, "aac", "flv"),
    "mpegts": (44100, 2, "mp2", "mpegts"),
    "mpegts-aac": (44100, 2, "aac", "mpegts"),
    "mpeg": (48000, 2, "ac3", "vob"),
    "mp2": (44100, 2, "mp2", "mp2"),
    "real": (44100, 2, "ac3", "rm"),
    "g722-in-wav": (16000, 1, "g722", "wav"),
    "wma-in-wav": (44100, 2, "wmav2", "wav"),
}
RARE_BYTES = ("dsf", "dff")
RARE = [*RARE_SOUNDFILE, *RARE_PYAV, *RARE_BYTES]


def rate_of(kind: str) -> int:
    if rare := (RARE_SOUNDFILE | RARE_PYAV).get(kind):
        return int(rare[0])
    if kind in RARE_BYTES:
        return DSD_RATE // 8
    return 48000 if kind in ("opus", "webm") else RATE


def channels_of(kind: str) -> int:
    rare = (RARE_SOUNDFILE | RARE_PYAV).get(kind)
    return int(rare[1]) if rare else 2


def music(num_samples: int, rate: int = RATE) -> np.ndarray:
    """Stereo `[n, 2]`, float32: a tone and noise, the right channel softer and delayed."""
    noise = np.random.default_rng(7).standard_normal(num_samples)
    left = 0.3 * np.sin(2 * np.pi * 440 * np.arange(num_samples) / rate) + 0.05 * noise
    return np.stack([left, 0.5 * np.roll(left, 100)], axis=1).astype(np.float32)


@cache
def encoded(kind: str, num_samples: int | None = None) -> bytes:
    """`music` in the format `kind`, one of ALL or RARE."""
    rate = rate_of(kind)
    if kind in RARE_BYTES:
        return dsd(kind, music(num_samples or rate // 20, rate))
    signal = music(num_samples or SECONDS * rate, rate)[:, : channels_of(kind)]
    if kind in RARE_SOUNDFILE:
        return sound(signal, rate, *RARE_SOUNDFILE[kind][2:])
    if kind in RARE_PYAV:
        layout = "stereo" if channels_of(kind) == 2 else "mono"
        sample = "s16" if kind == "tta" else None
        return with_pyav(signal, rate, *RARE_PYAV[kind][2:], {}, layout=layout, sample=sample)
    if kind in SOUNDFILE:
        container, subtype = SOUNDFILE[kind]
        return sound(signal, rate, container, subtype)
    return with_pyav(signal, rate, *PYAV[kind])


DSD_RATE = 2_822_400


def dsd(kind: str, signal: np.ndarray) -> bytes:
    """A signal `[n, 2]` at an eighth of DSD_RATE as one bit a sample, in DSF or DSDIFF."""
    density = np.cumsum((np.repeat(signal, 8, axis=0).astype(float) + 1) / 2, axis=0)
    pulses = np.diff(np.floor(density), axis=0, prepend=0).astype(np.uint8)
    if kind == "dff":
        packed = np.packbits(pulses, axis=0).tobytes()  # the first bit is the highest
        properties = b"SND FS  " + struct.pack(">QI", 4, DSD_RATE)
        properties += b"CHNL" + struct.pack(">QH", 10, 2) + b"SLFTSRGT"
        properties += b"CMPR" + struct.pack(">Q", 20) + b"DSD \x0enot compressed\0"
        chunks = b"FVER" + struct.pack(">QI", 4, 0x1050000)
        chunks += b"PROP" + struct.pack(">Q", len(properties)) + properties
        chunks += b"DSD " + struct.pack(">Q", len(packed)) + packed
        return b"FRM8" + struct.pack(">Q", 4 + len(chunks)) + b"DSD " + chunks
    packed = np.packbits(pulses, axis=0, bitorder="little")
    packed = np.pad(packed, ((0, -len(packed) % 4096), (0, 0)))
    blocks = packed.reshape(-1, 4096, 2).transpose(0, 2, 1).tobytes()  # 4,096 bytes a channel
    fmt = struct.pack("<QIIIIIIQII", 52, 1, 0, 2, 2, DSD_RATE, 1, len(pulses), 4096, 0)
    data = b"fmt " + fmt + b"data" + struct.pack("<Q", 12 + len(blocks)) + blocks
    return b"DSD " + struct.pack("<QQQ", 28, 28 + len(data), 0) + data


def sound(signal: np.ndarray, rate: int, container: str = "WAV", subtype: str = "FLOAT") -> bytes:
    """Any signal `[n]` or `[n, C]` through soundfile."""
    target, channels = io.BytesIO(), 1 if signal.ndim == 1 else signal.shape[1]
    with sf.SoundFile(target, "w", rate, channels, subtype, format=container) as output:
        step = 65536 // max(2, channels)  # a minute of Vorbis at once overruns the stack
        for start in range(0, len(signal), step):
            output.write(signal[start : start + step])
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
            if codec.startswith("wma"):  # its default is out of its own range
                stream.bit_rate = 128_000
            for start in range(0, len(signal), 4096):
                part = np.ascontiguousarray(signal[start : start + 4096]).reshape(1, -1)
                frame = av.AudioFrame.from_ndarray(part, format="flt", layout=layout)
                frame.sample_rate, frame.pts = rate, start
                output.mux(stream.encode(frame))
            output.mux(stream.encode(None))
        return Path(target.name).read_bytes()
