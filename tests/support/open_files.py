"""The files that this process has open, and a process that can open no more."""

from __future__ import annotations

import contextlib
import os
import resource
from collections.abc import Iterator
from pathlib import Path


def open_files(within: object = "/") -> set[tuple[str, str]]:
    """Number and path of each open file, those in memory included, but no sockets and pipes.

    A leak is a file that was not open before. Other tests in this process may leave files behind,
    which are closed at any time, so the number of open files says nothing.
    """
    found = set()
    for descriptor in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # it has been closed since
            found.add((descriptor.name, str(descriptor.readlink())))
    return {one for one in found if one[1].startswith(str(within)) and "/proc/" not in one[1]}


@contextlib.contextmanager
def no_more_files() -> Iterator[None]:
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    opened = [os.open(os.devnull, os.O_RDONLY)]
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(opened[0] + 64, limits[0]), limits[1]))
    try:
        with contextlib.suppress(OSError):
            while True:
                opened.append(os.dup(opened[0]))
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        for file in opened:
            os.close(file)
