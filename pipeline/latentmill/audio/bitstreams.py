"""Detects coded audio that is stored as PCM: DTS on CDs, and S/PDIF bitstreams (IEC 61937).

Such files play as loud noise. Their sync words, two 16-bit samples long, repeat at equal distances.
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
    words = (samples * 32768).astype(np.int16, order="C")
    frames = words.view(np.uint32)[:, 0]  # a sync word has its first half in the left channel
    for halves, name in _SYNC_WORDS.items():
        for swapped in (False, True):
            sync = [_swap(half) if swapped else half for half in halves]
            found = frames == np.array(sync, np.uint16).view(np.uint32)
            if np.count_nonzero(found) < _MIN_REPEATS:  # faster than finding them
                continue
            if len(set(np.diff(np.flatnonzero(found))[: _MIN_REPEATS - 1].tolist())) == 1:
                return name
    return None


def _swap(word: int) -> int:
    return (word & 0xFF) << 8 | word >> 8
