"""Reads and writes open files at given positions, whatever their size.

The system may transfer fewer bytes than requested: Linux at most 2 GiB less 4 KiB at once.
"""

from __future__ import annotations

import os


def read_at(descriptor: int, size: int, offset: int) -> bytes:
    """Read `size` bytes from `offset`; fewer only at the end of the file."""
    data = os.pread(descriptor, size, offset)
    if len(data) == size or not data:
        return data
    pieces, done = [data], len(data)
    while data := os.pread(descriptor, size - done, offset + done):
        pieces.append(data)
        done += len(data)
    return b"".join(pieces)


def write_at(descriptor: int, data: bytes, offset: int) -> None:
    """Write all of `data` at `offset`."""
    view = memoryview(data)
    while view:
        written = os.pwrite(descriptor, view, offset)
        view, offset = view[written:], offset + written
