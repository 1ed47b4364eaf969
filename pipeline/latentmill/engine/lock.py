"""One run at a time: a lock on a store that lies on a disk, a lease on one in a bucket.

Either is taken before the plan is read or made, so that two first runs cannot both plan one store.
The driver and its workers share the lock: a run that starts after another one was killed waits
until Ray has ended the last of its workers, which cannot write into the new run's store then. A
lock is gone with its process. Object storage has no such locks: there the driver holds a lease
(`lease.py`), and driver and workers read it right before everything that they publish.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, Protocol

from pydantic import ValidationError

from latentmill.engine.holder import Holder, RunProgress, this_process
from latentmill.engine.lease import guarded, hold
from latentmill.errors import StorageError, StoreError
from latentmill.storage.storage import Storage

LOCK_PATH = ".lock"
WAIT_SECONDS = 10.0
POLL_SECONDS = 0.05


class Hold(Protocol):
    """What a run has of its store while it writes there."""

    @property
    def owner(self) -> str | None:
        """By which workers recognise their run's lease; None: there is none."""
        ...

    @property
    def storage(self) -> Storage:
        """The store, to write through: it refuses writes once another run has taken over."""
        ...

    def publish(self, progress: RunProgress) -> None:
        """Tell other processes how far the run is; see `running.py`."""
        ...

    def check(self) -> None:
        """Make sure that the store is still this run's; cheap, for every turn of a loop.

        Raises:
            StoreError: It is not: nothing more may be written.
        """
        ...


class _Flock:
    """Held until the process ends, whatever happens."""

    owner = None

    def __init__(self, storage: Storage, file: BinaryIO) -> None:
        self.storage = storage
        self._file = file
        self._holder = this_process()
        self._write()

    def check(self) -> None:
        """Nobody can take it."""

    def publish(self, progress: RunProgress) -> None:
        """Write it into the lock file."""
        self._holder = self._holder.model_copy(update={"progress": progress})
        self._write()

    def _write(self) -> None:
        """Replace the first line, in one call; what a longer one left behind it is not read."""
        with contextlib.suppress(OSError):  # only `status` reads it
            os.pwrite(self._file.fileno(), self._holder.model_dump_json().encode() + b"\n", 0)


@contextlib.contextmanager
def only_run(storage: Storage) -> Iterator[Hold]:
    """Hold a store for a run; a store that is still empty at the end leaves no trace.

    Raises:
        StoreError: Another run, or a worker of one, has held the store for `WAIT_SECONDS`, or
            another run's lease is alive.
        StorageError: The store cannot be written.
    """
    if not storage.local:
        with hold(storage) as lease:
            yield lease
        return
    path = Path(storage.full(LOCK_PATH))
    created = not path.parent.exists()
    with contextlib.closing(_acquire(path, storage)) as file:
        try:
            yield _Flock(storage, file)
        finally:
            with contextlib.suppress(
                OSError
            ):  # a full disk ends the run elsewhere, with its reason
                file.truncate(0)
            if [entry.name for entry in path.parent.iterdir()] == [LOCK_PATH]:
                path.unlink()
                if created:
                    path.parent.rmdir()


class Membership:
    """A worker's part in its run's hold on the store, until it is closed.

    Attributes:
        storage: The store, to write through.
    """

    def __init__(self, storage: Storage, owner: str | None) -> None:
        """Join the run that holds the store, as `owner` if by a lease.

        Raises:
            StoreError: Another run holds it.
        """
        self.storage = storage if owner is None else guarded(storage, owner)
        self._file: BinaryIO | None = None
        if storage.local:
            self._file = _open(Path(storage.full(LOCK_PATH)), storage)
            if not _lock(self._file, fcntl.LOCK_SH):
                self._file.close()
                raise StoreError(f"Another run has begun to write into {storage.root}.")

    def close(self) -> None:
        """Leave."""
        if self._file is not None:
            self._file.close()


def join_run(storage: Storage, owner: str | None = None) -> Membership:
    """Hold a store for a worker of the run that holds it; see `Membership`."""
    return Membership(storage, owner)


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
        # NFS locks what is writable.
        return os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+b", buffering=0)
    except OSError as error:
        raise StorageError(f"Cannot write {storage.root}/{LOCK_PATH}: {error.strerror}.") from error


def read_lock(storage: Storage) -> Holder | None:
    """Read who holds, or held, the lock of a local store.

    None if the last run ended in order, or was one of an older version.
    """
    for _ in range(3):  # a read may meet a write
        line, end, _ = (storage.read_if_exists(LOCK_PATH) or b"").partition(b"\n")
        if not end:
            return None
        with contextlib.suppress(ValidationError):
            return Holder.model_validate_json(line)
    return None


def is_locked(storage: Storage) -> bool | None:
    """Whether somebody holds the lock of a local store; None if its file system cannot tell.

    For a moment it holds the lock itself if nobody else does.
    """
    try:
        with Path(storage.full(LOCK_PATH)).open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except FileNotFoundError:
        return False
    except OSError:
        return None
    return False


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
