"""Coded audio that pretends to be PCM: DTS on CDs, and what goes over S/PDIF (IEC 61937).

Such files play as loud noise. Their sync words, as 16-bit samples, come at equal distances.
"""

from __future__ import annotations

import numpy as np

from latentmill.record import FloatArray

CODECS = ("pcm_16", "pcm_s16le", "pcm_s16be", "flac", "alac", "wavpack")
"""Codecs that keep 16-bit samples as they are."""

_SYNC_WORDS = {
    (0x7FFE, 0x8001): "DTS",
    (0x1FFF, 0xE800): "DTS",
    (0xF872, 0x4E1F): "an S/PDIF (IEC 61937) bitstream",
}
_LEAST = 3


def packed_into_pcm(samples: FloatArray) -> str | None:
    """What samples `[n, 2]` really are: `DTS`; None for sound."""
    words = (samples * 32768).astype(np.int32).reshape(-1) & 0xFFFF
    for (first, second), name in _SYNC_WORDS.items():
        for swapped in (False, True):
            pair = (_swap(first), _swap(second)) if swapped else (first, second)
            at = np.flatnonzero((words[:-1] == pair[0]) & (words[1:] == pair[1]))
            if len(at) >= _LEAST and len(set(np.diff(at)[: _LEAST - 1].tolist())) == 1:
                return name
    return None


def _swap(word: int) -> int:
    return (word & 0xFF) << 8 | word >> 8
