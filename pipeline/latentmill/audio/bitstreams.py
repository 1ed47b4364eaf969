"""Detects coded audio that is stored as PCM: DTS on CDs, and S/PDIF bitstreams (IEC 61937).

Such files play as loud noise. Their sync words repeat at equal distances in the 16-bit samples.
"""

from __future__ import annotations

import numpy as np

from latentmill.record import FloatArray

CODECS = ("pcm_16", "pcm_s16le", "pcm_s16be", "flac", "alac", "wavpack")
"""Codecs that preserve 16-bit samples exactly."""

_SYNC_WORDS = {
    (0x7FFE, 0x8001): "DTS",
    (0x1FFF, 0xE800): "DTS",
    (0xF872, 0x4E1F): "an S/PDIF (IEC 61937) bitstream",
}
_MIN_REPEATS = 3


def packed_into_pcm(samples: FloatArray) -> str | None:
    """The coding of samples `[n, 2]`, such as `DTS`; None if they are sound."""
    words = (samples * 32768).astype(np.int32).astype(np.uint16).reshape(-1)
    for (first, second), name in _SYNC_WORDS.items():
        for swapped in (False, True):
            pair = (_swap(first), _swap(second)) if swapped else (first, second)
            at = np.flatnonzero(words[:-1] == pair[0])
            at = at[words[at + 1] == pair[1]]
            if len(at) >= _MIN_REPEATS and len(set(np.diff(at)[: _MIN_REPEATS - 1].tolist())) == 1:
                return name
    return None


def _swap(word: int) -> int:
    return (word & 0xFF) << 8 | word >> 8
