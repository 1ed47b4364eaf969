"""One run at a time: a lock on a store that lies on a disk.

It is taken before the plan is read or made, so that two first runs cannot both plan one store. The
driver and its workers share it: a run that starts after another one was killed waits until Ray has
ended the last of its workers, which cannot write into the new run's store then. A lock is gone with
its process. Object storage has no such locks: there a worker that outlives its driver for a moment
writes the same bytes as the new run.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from latentmill.errors import StorageError, StoreError
from latentmill.storage import Storage

LOCK_PATH = ".lock"
WAIT_SECONDS = 10.0
POLL_SECONDS = 0.05


@contextlib.contextmanager
def only_run(storage: Storage) -> Iterator[None]:
    """Hold a store for a run; a store that is still empty at the end leaves no trace.

    Raises:
        StoreError: Another run, or a worker of one, has held the store for `WAIT_SECONDS`.
        StorageError: The store's folder cannot be made or written.
    """
    if not storage.local:
        yield
        return
    path = Path(storage.full(LOCK_PATH))
    created = not path.parent.exists()
    with contextlib.closing(_acquire(path, storage)):
        try:
            yield
        finally:
            if [entry.name for entry in path.parent.iterdir()] == [LOCK_PATH]:
                path.unlink()
                if created:
                    path.parent.rmdir()


def join_run(storage: Storage) -> BinaryIO | None:
    """Hold a store for a worker of the run that holds it, as long as the file is open."""
    if not storage.local:
        return None
    file = _open(Path(storage.full(LOCK_PATH)), storage)
    if not _lock(file, fcntl.LOCK_SH):
        file.close()
        raise StoreError(f"Another run has begun to write into {storage.root}.")
    return file


def _acquire(path: Path, storage: Storage) -> BinaryIO:
    """Take the lock, shared in the end, so that this run's workers can join."""
    end = time.monotonic() + WAIT_SECONDS
    while True:
        file = _open(path, storage)
        # Whoever held the lock before may have removed the file: then it is no lock any more.
        if _lock(file, fcntl.LOCK_EX) and _is_at(file, path) and _lock(file, fcntl.LOCK_SH):
            return file
        file.close()
        if time.monotonic() > end:
            raise StoreError(
                f"Another run is writing into {storage.root}: wait until it has ended."
            )
        time.sleep(POLL_SECONDS)


def _open(path: Path, storage: Storage) -> BinaryIO:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return path.open("a+b")  # NFS locks what is writable
    except OSError as error:
        raise StorageError(f"Cannot write {storage.root}/{LOCK_PATH}: {error.strerror}.") from error


def _is_at(file: BinaryIO, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _lock(file: BinaryIO, kind: int) -> bool:
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a network file system without locks: nothing can be promised there
        return True
    return True
