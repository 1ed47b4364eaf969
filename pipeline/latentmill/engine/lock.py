"""One run at a time: a lock on the plan of a store that lies on a disk.

The driver and its workers share the lock, so that a run that starts after another one was killed
waits until Ray has ended the last of its workers: they cannot write into the new run's store.
A lock is gone with its process. Object storage has no such locks: there a worker that outlives its
driver by a second or two writes the same bytes as the new run.
"""

from __future__ import annotations

import contextlib
import fcntl
import time
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, Literal

from latentmill.errors import StorageError, StoreError
from latentmill.plan import PLAN_PATH
from latentmill.storage import Storage

WAIT_SECONDS = 10.0
POLL_SECONDS = 0.05


@contextlib.contextmanager
def only_run(storage: Storage) -> Iterator[None]:
    """Hold a store for a run.

    Raises:
        StoreError: Another run, or a worker of one, has held the store for `WAIT_SECONDS`.
        StorageError: The store may not be written.
    """
    if not storage.local:
        yield
        return
    with _open_plan(storage, "rb+") as file:  # NFS locks what is writable
        end = time.monotonic() + WAIT_SECONDS
        while not (_lock(file, fcntl.LOCK_EX) and _lock(file, fcntl.LOCK_SH)):
            if time.monotonic() > end:
                raise StoreError(
                    f"Another run is writing into {storage.root}: wait until it has ended."
                )
            time.sleep(POLL_SECONDS)
        yield


def join_run(storage: Storage) -> BinaryIO | None:
    """Hold a store for a worker of the run that holds it, as long as the file is open."""
    if not storage.local:
        return None
    file = _open_plan(storage, "rb")
    if not _lock(file, fcntl.LOCK_SH):
        file.close()
        raise StoreError(f"Another run has begun to write into {storage.root}.")
    return file


def _open_plan(storage: Storage, mode: Literal["rb", "rb+"]) -> BinaryIO:
    path = Path(storage.full(PLAN_PATH))
    try:
        return path.open(mode)
    except OSError as error:
        raise StorageError(f"Cannot write {storage.root}: {error.strerror}.") from error


def _lock(file: BinaryIO, kind: int) -> bool:
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a network file system without locks: nothing can be promised there
        return True
    return True
