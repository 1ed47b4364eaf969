"""The demo's first song as a tensor: models are measured with music, never with noise or tones.

Errors measured with noise are smaller than with music.
"""

from __future__ import annotations

import functools

import numpy as np
import torch
from torch import Tensor

from latentmill.demo.corpus import SONGS
from latentmill.demo.synth import stems
from latentmill.record import FloatArray

STEREO = 2


def music(sample_rate: int, channels: int, samples: int) -> Tensor:
    """Synthesise `[channels, samples]`; the song is repeated if it is too short."""
    mix = _song(sample_rate)
    if channels == 1:
        mix = mix.mean(axis=0, keepdims=True)
    elif channels > STEREO:
        mix = np.resize(mix, (channels, mix.shape[1]))
    return repeated(mix, samples)


def repeated(audio: FloatArray, samples: int) -> Tensor:
    times = -(-samples // audio.shape[1])
    return torch.from_numpy(np.ascontiguousarray(np.tile(audio, (1, times))[:, :samples]))


@functools.lru_cache(maxsize=4)
def _song(sample_rate: int) -> FloatArray:
    tracks = stems(SONGS[0].score, sample_rate, STEREO)
    mix: FloatArray = np.sum(list(tracks.values()), axis=0, dtype=np.float32)
    return mix
