"""File locks as network file systems give them."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Callable
from typing import BinaryIO

import pytest

Flock = Callable[[int | BinaryIO, int], None]
flock: Flock = fcntl.flock


def as_on_nfs(patch: pytest.MonkeyPatch) -> None:
    """Exclusive locks need a descriptor that is open for writing (man 2 flock)."""

    def nfs(file: int | BinaryIO, operation: int) -> None:
        number = file if isinstance(file, int) else file.fileno()
        reads = fcntl.fcntl(number, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY
        if operation & fcntl.LOCK_EX and reads:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        flock(file, operation)

    patch.setattr(fcntl, "flock", nfs)


def that_fail(patch: pytest.MonkeyPatch, code: int) -> None:
    """Every lock fails with this error number."""

    def failing(file: int | BinaryIO, operation: int) -> None:
        raise OSError(code, os.strerror(code))

    patch.setattr(fcntl, "flock", failing)
