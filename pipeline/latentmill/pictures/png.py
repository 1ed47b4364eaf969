"""Writing indexed PNG files. It takes a few lines, so pictures need no imaging library."""

from __future__ import annotations

import struct
import zlib

import numpy as np
import numpy.typing as npt

from latentmill.pictures.colours import Palette

_INDEXED = 3  # colour type: one byte per pixel, the number of a colour


def png(pixels: npt.NDArray[np.uint8], palette: Palette) -> bytes:
    """Encode an image `[height, width]` of colour numbers; a palette `[n, 4]` has alpha."""
    height, width = pixels.shape
    rows = np.zeros((height, width + 1), np.uint8)  # the first byte of a row: not filtered
    rows[:, 1:] = pixels
    chunks = {
        b"IHDR": struct.pack(">IIBBBBB", width, height, 8, _INDEXED, 0, 0, 0),
        b"PLTE": palette[:, :3].tobytes(),
        b"tRNS": palette[:, 3].tobytes() if palette.shape[1] == 4 else b"",
        b"IDAT": zlib.compress(rows.tobytes(), 9),
        b"IEND": b"",
    }
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in chunks.items()
        if data or name != b"tRNS"
    )
