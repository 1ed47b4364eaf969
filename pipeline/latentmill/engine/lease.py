"""One run at a time on object storage: a lease, which is a small object in the store.

Object storage has no locks. The holder of the lease writes a heartbeat into it every few seconds.
Another run that finds a lease watches it. If the heartbeat changes, that run is refused. If it does
not change for `dead_after` seconds of the other run's monotonic clock, that run takes the lease
over. The clocks of two machines are never compared, because one of them may be hours off. If the
holder was a process of this machine and has ended, the lease is taken over at once.

To take a lease, a run writes it create-only (on S3 `If-None-Match`), pauses, and reads it again. If
two runs take over the same dead lease, the later one has it. A holder that was only slow writes its
lease back during the pause. A holder that finds another owner in the lease stops writing: driver
and workers write through `guard.py`, which reads the lease right before each write.
"""

from __future__ import annotations

import contextlib
import datetime
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass

from pydantic import Field, ValidationError

from latentmill.engine.holder import Holder, RunProgress, this_process
from latentmill.errors import StorageError, StoreError
from latentmill.plan import PLAN_PATH
from latentmill.storage.guard import GuardedStorage
from latentmill.storage.storage import Storage
from latentmill.store.schema import DATASET_PATH

LEASE_PATH = ".lease"
LONGEST_DEAD_AFTER = 3600.0  # the most seconds that a lease may make another run wait


@dataclass(frozen=True)
class Timing:
    """Intervals of a lease, in seconds."""

    period: float = 5.0  # between two heartbeats
    dead_after: float = 60.0  # without a heartbeat
    settle: float = 2.0  # between writing a lease and checking who has it
    poll: float = 1.0  # between two reads of another run's lease


class LeaseDocument(Holder):
    """Content of the lease object."""

    owner: str
    heartbeat: str  # the time of the last heartbeat; only compared for equality
    dead_after: float = Field(gt=0, le=LONGEST_DEAD_AFTER, allow_inf_nan=False)


class Lease:
    """The lease of a run on a store. Made by `hold`.

    Attributes:
        owner: Random id of the run.
        storage: The store. It refuses writes after another run has taken over.
    """

    storage: Storage

    def __init__(self, storage: Storage, timing: Timing) -> None:
        self.owner = uuid.uuid4().hex
        self._holder = this_process()
        self._storage = storage
        self._timing = timing
        self._lost: str | None = None
        self._renewed = time.monotonic()
        self._beating = threading.Lock()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="lease", daemon=True)

    def check(self) -> None:
        """Raise StoreError if another run has taken over; cheap enough for every loop iteration.

        Raises StorageError if the heartbeat is overdue and cannot be written.
        """
        limit = self._timing.dead_after - 2 * self._timing.period
        if self._lost is None and time.monotonic() - self._renewed > limit:
            self._beat()  # this process was suspended, or the storage was unreachable
        if self._lost is not None:
            raise StoreError(
                f"This run lost its lease on {self._storage.root} ({self._lost}): wait until no "
                "other run is writing there, then run again."
            )

    def publish(self, progress: RunProgress) -> None:
        """Write the progress into the lease with the next heartbeat."""
        self._holder = self._holder.model_copy(update={"progress": progress})

    def _take(self) -> None:
        """Wait until this run has the lease. Raises StoreError if the run that has it is alive."""
        first: LeaseDocument | None = None
        since = 0.0
        while True:
            found = read_lease(self._storage)
            if found is None:
                taken = self._storage.create(LEASE_PATH, self._document())
                self._over.wait(self._timing.settle if taken else 0.0)
                if taken and self._is_ours():
                    self._renewed = time.monotonic()
                    return
                first = None
                continue
            if first is None or found.owner != first.owner:
                first, since = found, time.monotonic()
            if found.heartbeat != first.heartbeat or found.alive:
                raise StoreError(
                    f"Another run is writing to {self._storage.root} ({found.where}): wait until "
                    "it has ended."
                )
            if found.alive is False or time.monotonic() - since > found.dead_after:
                if read_lease(self._storage) == found:
                    self._storage.delete(LEASE_PATH)
            else:
                self._over.wait(self._timing.poll)

    def _renew(self) -> None:
        while self._lost is None and not self._over.wait(self._timing.period):
            with contextlib.suppress(StorageError):  # `check` raises it if it persists
                self._beat()

    def _beat(self) -> None:
        with self._beating:
            found = read_lease(self._storage)
            if found is None or found.owner != self.owner:
                self._lost = "it was deleted" if found is None else f"taken over by {found.where}"
                return
            self._storage.write(LEASE_PATH, self._document())
            self._renewed = time.monotonic()

    def _release(self) -> None:
        self._over.set()
        if self._thread.ident is not None:
            self._thread.join()
        with contextlib.suppress(StorageError):  # the next run finds it dead
            if self._is_ours():
                self._storage.delete(LEASE_PATH)

    def _is_ours(self) -> bool:
        found = read_lease(self._storage)
        return found is not None and found.owner == self.owner

    def _document(self) -> bytes:
        document = LeaseDocument(
            **dict(self._holder),
            owner=self.owner,
            heartbeat=datetime.datetime.now(datetime.UTC).isoformat(),
            dead_after=self._timing.dead_after,
        )
        return document.model_dump_json(indent=1).encode()


@contextlib.contextmanager
def hold(storage: Storage, timing: Timing | None = None) -> Iterator[Lease]:
    """Hold the lease of a store. Raises StoreError if another run that is alive has it."""
    lease = Lease(storage, timing or Timing())
    try:
        lease._take()
        lease._thread.start()
        lease.storage = guarded(storage, lease.owner, followed=(PLAN_PATH, DATASET_PATH))
        yield lease
    finally:
        lease._release()


def guarded(storage: Storage, owner: str, followed: tuple[str, ...] = ()) -> GuardedStorage:
    """A view of the store that refuses writes unless `owner` has the lease."""
    return GuardedStorage(storage.root, lambda: check_owner(storage, owner), followed)


def check_owner(storage: Storage, owner: str) -> None:
    """Read the lease, and raise StoreError unless `owner` has it."""
    found = read_lease(storage)
    if found is None or found.owner != owner:
        raise StoreError(
            f"Another run has started to write to {storage.root}: wait until it has ended."
        )


def read_lease(storage: Storage) -> LeaseDocument | None:
    """Read the lease of a store, or None if there is none."""
    text = storage.read_if_exists(LEASE_PATH)
    if text is None:
        return None
    try:
        return LeaseDocument.model_validate_json(text)
    except ValidationError as error:
        raise StoreError(
            f"{storage.root}/{LEASE_PATH} is not a valid lease: delete it if no run is writing to "
            "the store."
        ) from error
