"""Audio as Ogg Opus, which all browsers play."""

from __future__ import annotations

import base64
import io
from typing import Any

import av
import numpy as np
import numpy.typing as npt
import soxr

RATE = 48_000  # that of Opus
# Of 10; the highest takes a third longer, and libsndfile's encoder five times as long.
_EFFORT = "5"


def opus(audio: npt.NDArray[Any], rate: int, *, kbps: int = 96) -> bytes:
    """Encode audio `[channels, samples]`; more than two channels become one.

    `kbps` is the bit rate of all channels. Samples beyond full scale are clipped.
    """
    samples = np.nan_to_num(np.atleast_2d(audio).astype(np.float32)).T  # [n, C]
    if not len(samples):  # players need at least one sample
        samples = np.zeros((1, samples.shape[1]), np.float32)
    if samples.shape[1] > 2:
        samples = samples.mean(axis=1, keepdims=True)
    if rate != RATE:
        samples = soxr.resample(samples, rate, RATE)
    samples = np.ascontiguousarray(np.clip(samples, -1, 1), np.float32)
    layout = "mono" if samples.shape[1] == 1 else "stereo"
    output = io.BytesIO()
    with av.open(output, "w", format="ogg") as file:
        options = {"compression_level": _EFFORT}
        stream = file.add_stream("libopus", rate=RATE, layout=layout, options=options)
        stream.bit_rate = 1000 * kbps
        for start in range(0, len(samples), RATE):
            block = samples[start : start + RATE].reshape(1, -1)
            frame = av.AudioFrame.from_ndarray(block, format="flt", layout=layout)
            frame.sample_rate, frame.pts = RATE, start
            file.mux(stream.encode(frame))
        file.mux(stream.encode(None))
    return output.getvalue()


def opus_uri(data: bytes) -> str:
    """Ogg Opus bytes as a data URI."""
    return f"data:audio/ogg;base64,{base64.b64encode(data).decode()}"
