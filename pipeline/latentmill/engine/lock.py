"""One run at a time: a lock on a store on a local disk, a lease on a store in a bucket.

Either is taken before the plan is read or made, so that two first runs cannot both plan one store.
The driver and its workers share the lock. If a run is killed, the next run waits until Ray has
ended the last worker of the killed one, so that no old worker writes to the store. The lock ends
with its process. Object storage has no such locks: there the driver holds a lease (`lease.py`), and
driver and workers read it right before each write.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, TypeAlias

from pydantic import ValidationError

from latentmill.engine.holder import Holder, RunProgress, this_process
from latentmill.engine.lease import Lease, guarded, hold
from latentmill.errors import StorageError, StoreError
from latentmill.storage import hub, scratch
from latentmill.storage.storage import Storage, writing

LOCK_PATH = ".lock"
WAIT_SECONDS = 10.0
POLL_SECONDS = 0.05


class FileLock:
    """A file lock, which the kernel releases when the process ends.

    Attributes:
        owner: Always None; the id of a run's lease for stores in buckets.
        storage: The store.
    """

    owner = None

    def __init__(self, storage: Storage, file: BinaryIO) -> None:
        self.storage = storage
        self._file = file
        self._holder = this_process()
        self._write()

    def check(self) -> None:
        """Do nothing: another process cannot take this lock."""

    def publish(self, progress: RunProgress) -> None:
        """Publish the progress for other processes, which read it with `running.py`."""
        self._holder = self._holder.model_copy(update={"progress": progress})
        self._write()

    def _write(self) -> None:
        """Replace the first line in one call. Readers ignore the rest of a longer old line."""
        with contextlib.suppress(OSError):  # only `status` reads it
            os.pwrite(self._file.fileno(), self._holder.model_dump_json().encode() + b"\n", 0)


Hold: TypeAlias = FileLock | Lease  # a run's exclusive access to a store


@contextlib.contextmanager
def only_run(storage: Storage) -> Iterator[Hold]:
    """Hold a store for a run. A store that is still empty at the end is removed.

    Raises StoreError if another run, or a worker of one, keeps the lock for `WAIT_SECONDS`, or if
    another run's lease is alive, and ConfigError if the store is on the Hugging Face hub.
    """
    hub.refuse_store(storage.root)
    if not storage.local:
        with hold(storage) as lease:
            yield lease
        return
    path = Path(storage.full(LOCK_PATH))
    created = not path.parent.exists()
    with _acquire(path, storage) as file:
        try:
            yield FileLock(storage, file)
        finally:
            with contextlib.suppress(OSError):  # a full disk is reported where the run writes
                file.truncate(0)
            with contextlib.suppress(OSError):  # so is a folder that was removed
                if [entry.name for entry in path.parent.iterdir()] == [LOCK_PATH]:
                    path.unlink()
                    if created:
                        path.parent.rmdir()


class Membership:
    """A worker's share in the lock or lease of its run, until it is closed.

    Attributes:
        storage: The store. It refuses writes after another run has taken over.
    """

    def __init__(self, storage: Storage, owner: str | None = None) -> None:
        """Join the run that has the store.

        Raises StoreError if another run has it, and StorageError if this machine lacks its folder.
        `owner` is the id in the run's lease, or None if the store is locked by file.
        """
        self.storage = storage if owner is None else guarded(storage, owner)
        self._file: BinaryIO | None = None
        if not storage.local:
            storage.clear_scratch()  # on this machine's disk, of workers that were killed
        else:
            with writing(storage.root):
                there = Path(storage.root).is_dir()  # the driver has made it
            if not there:
                raise StorageError(
                    f"Folder {storage.root} does not exist on {socket.gethostname()}: mount its "
                    "file system there, then run the same command again."
                )
            with contextlib.ExitStack() as undo:
                file = undo.enter_context(_open(Path(storage.full(LOCK_PATH)), storage))
                if not _lock(file, storage, fcntl.LOCK_SH):
                    raise StoreError(
                        f"Another run has started to write to {storage.root}: wait until it has "
                        "ended."
                    )
                undo.pop_all()
            self._file = file

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


def _acquire(path: Path, storage: Storage) -> BinaryIO:
    """Take the lock exclusively, then make it shared, so that this run's workers can join."""
    end = time.monotonic() + WAIT_SECONDS
    while True:
        with contextlib.ExitStack() as undo:
            file = undo.enter_context(_open(path, storage))
            # The previous holder may have removed the file; a lock on a removed file has no effect.
            if _lock(file, storage) and _is_at(file, path) and _lock(file, storage, fcntl.LOCK_SH):
                undo.pop_all()
                return file
        if time.monotonic() > end:
            raise StoreError(f"Another run is writing to {storage.root}: wait until it has ended.")
        time.sleep(POLL_SECONDS)


def _open(path: Path, storage: Storage) -> BinaryIO:
    with writing(f"{storage.root}/{LOCK_PATH}"):
        # NFS can only lock a file that is open for writing. Another run may remove the folder.
        flags = os.O_RDWR | os.O_CREAT
        descriptor = scratch.open_in_folder(path, lambda path: os.open(path, flags, 0o666))
        return os.fdopen(descriptor, "r+b", buffering=0)


def _lock(file: BinaryIO, storage: Storage, kind: int = fcntl.LOCK_EX) -> bool:
    with writing(f"{storage.root}/{LOCK_PATH}"):
        return scratch.lock(file, kind)


def read_lock(storage: Storage) -> Holder | None:
    """The process that has or had the lock of a local store.

    None if the last run ended normally, or was one of an older version.
    """
    for _ in range(3):  # a read may overlap with a write
        line, end, _ = (storage.read_if_exists(LOCK_PATH) or b"").partition(b"\n")
        if not end:
            return None
        with contextlib.suppress(ValidationError):
            return Holder.model_validate_json(line)
    return None


def is_locked(storage: Storage) -> bool | None:
    """Whether a process has the lock of a local store; None if that cannot be known.

    The file system may have no locks, or be NFS, where only those who may write to a file can see
    whether it is locked. It tries to take the lock, so that it has the lock for a moment itself.
    """
    try:
        with scratch.open_to_lock(Path(storage.full(LOCK_PATH))) as file:
            return not scratch.try_lock(file)
    except FileNotFoundError:
        return False
    except OSError:
        return None


def _is_at(file: BinaryIO, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False
