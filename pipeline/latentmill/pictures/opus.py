"""Audio as Ogg Opus, which all browsers play."""

from __future__ import annotations

import base64
import io
from typing import Any

import numpy as np
import numpy.typing as npt
import soundfile
import soxr

RATE = 48_000  # that of Opus
_BLOCK = RATE // 10  # libsndfile crashes when it encodes a long sound in one call
_LEAST, _MOST = 6_000, 256_000  # bit/s of a channel at the ends of libsndfile's compression level


def opus(audio: npt.NDArray[Any], rate: int, *, kbps: int = 96) -> bytes:
    """Encode audio `[channels, samples]`; more than two channels become one.

    `kbps` is the bit rate of all channels. Samples beyond full scale are clipped.
    """
    samples = np.nan_to_num(np.atleast_2d(audio).astype(np.float32)).T  # [n, C]
    if samples.shape[1] > 2:
        samples = samples.mean(axis=1, keepdims=True)
    if rate != RATE:
        samples = soxr.resample(samples, rate, RATE)
    samples = np.clip(samples, -1, 1)
    channels = samples.shape[1]
    level = (_MOST - 1000 * kbps / channels) / (_MOST - _LEAST)
    output = io.BytesIO()
    with soundfile.SoundFile(
        output,
        "w",
        RATE,
        channels,
        format="OGG",
        subtype="OPUS",
        compression_level=float(np.clip(level, 0, 1)),
    ) as file:
        for start in range(0, len(samples), _BLOCK):
            file.write(samples[start : start + _BLOCK])
    return output.getvalue()


def opus_uri(data: bytes) -> str:
    """Ogg Opus bytes as a data URI."""
    return f"data:audio/ogg;base64,{base64.b64encode(data).decode()}"
