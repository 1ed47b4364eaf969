"""Arrays as .npy files. One that is read may be damaged, or made to do harm."""

from __future__ import annotations

import io
import math
from tokenize import TokenError
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

_format: Any = np.lib.format  # without type hints
# What numpy raises, beside ValueError and TypeError, for a header that it cannot parse.
BAD_HEADER = (SyntaxError, TokenError, MemoryError, RecursionError)


def npy_bytes(array: npt.NDArray[Any]) -> bytes:
    """The content of an .npy file."""
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()


def read_npy_header(file: BinaryIO) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """The shape, whether it is in Fortran order, and the type. Raises ValueError."""
    try:
        if (version := _format.read_magic(file)) != (1, 0):
            raise ValueError(f"version {version} of the format is not supported")
        shape, in_columns, dtype = _format.read_array_header_1_0(file)
    except (ValueError, TypeError, *BAD_HEADER) as error:
        raise ValueError("it is not an .npy file") from error
    if any(type(length) is not int or length < 0 for length in shape):
        raise ValueError(f"{shape} is not the shape of an array")
    return shape, in_columns, dtype


def parse_npy(data: bytes) -> npt.NDArray[Any]:
    """The array in an .npy file. Raises ValueError if the file is not whole or has no numbers."""
    file = io.BytesIO(data)
    shape, in_columns, dtype = read_npy_header(file)
    found = len(data) - file.tell()
    if dtype.kind not in "fiu" or math.prod(shape) * dtype.itemsize != found or not found:
        raise ValueError(f"{found} bytes are not numbers of the shape {shape}")
    array = np.frombuffer(data, dtype, offset=file.tell())
    return array.reshape(shape, order="F" if in_columns else "C").copy()
