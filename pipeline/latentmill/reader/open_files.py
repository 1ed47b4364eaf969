"""Open files and mapped files of local shards, within one limit for all readers of a process."""

from __future__ import annotations

import mmap
import os
import resource
import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import TypeVar

from latentmill.storage.remote import NO_MORE_FILES

MOST_FILES = 1024
SHARE = 4  # the readers use a quarter of the files that the process may open

T = TypeVar("T", "OpenFile", mmap.mmap)


class OpenFile:
    """A file that is closed when the last reference to it is gone.

    A thread that reads it keeps it open when another thread closes it to open its own.
    """

    def __init__(self, path: str) -> None:
        self._pid = -1
        self.number = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self._pid = os.getpid()

    def __del__(self) -> None:
        if self._pid == os.getpid():  # a fork leaves its parent's files open
            os.close(self.number)

    @property
    def size(self) -> int:
        return os.fstat(self.number).st_size

    def mapped(self) -> mmap.mmap:
        """The file, mapped into memory, which keeps it open."""
        return mmap.mmap(self.number, 0, access=mmap.ACCESS_COPY)


class OpenFiles:
    """The files of all readers of one process; closes those that were used least recently.

    Thread-safe.
    """

    def __init__(self) -> None:
        self.pid = os.getpid()
        self._lock = threading.RLock()  # a reader may be deleted while its thread holds it
        self._open: OrderedDict[tuple[int, str, type], OpenFile | mmap.mmap] = OrderedDict()

    @staticmethod
    def limit() -> int:
        """The most files that are kept open."""
        soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        return MOST_FILES if soft < 0 else max(1, min(MOST_FILES, soft // SHARE))

    def get(self, reader: int, path: str, kind: type[T], make: Callable[[], T]) -> T:
        """A file of a reader; `make` opens it if it is not open.

        Raises OSError if it cannot be opened, even after closing all other files.
        """
        key = (reader, path, kind)
        with self._lock:
            found = self._open.get(key)
            if isinstance(found, kind):
                self._open.move_to_end(key)
                return found
        made = self._made(make)
        with self._lock:
            self._open[key] = made
            while len(self._open) > self.limit():
                self._open.popitem(last=False)
        return made

    def _made(self, make: Callable[[], T]) -> T:
        try:
            return make()
        except OSError as error:
            if error.errno not in NO_MORE_FILES:
                raise
        with self._lock:
            self._open.clear()
        return make()

    def close(self, reader: int) -> None:
        """Close the files of one reader."""
        with self._lock:
            for key in list(self._open):
                if key[0] == reader:
                    self._open.pop(key, None)


_files = OpenFiles()


def files_of_process() -> OpenFiles:
    """The open files of this process; a fork starts without its parent's, and with its own lock."""
    global _files  # noqa: PLW0603
    if _files.pid != os.getpid():
        _files = OpenFiles()
    return _files
