"""Finds the run that is writing to a store, from another process."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Literal

from latentmill.engine.holder import Holder, RunProgress
from latentmill.engine.lease import read_lease
from latentmill.engine.lock import is_locked, read_lock
from latentmill.storage.storage import Storage

HEARTBEAT_WAIT_SECONDS = 12.0  # more than two periods of a lease
POLL_SECONDS = 0.5


@dataclass(frozen=True)
class CurrentRun:
    """A run that is writing to a store, or was when it was killed.

    Attributes:
        state: `silent` is a run on another machine whose heartbeat did not change while we waited,
            or whose lock cannot be seen from this machine.
        user, host, pid: The driver's.
        since: When the run started, in UTC, by the clock of its host.
        heartbeat: Time of the last heartbeat, by the same clock; None on a local disk.
        progress: None while the run lists its source.
    """

    state: Literal["running", "silent", "stopped"]
    user: str
    host: str
    pid: int
    since: str
    heartbeat: str | None
    progress: RunProgress | None

    @property
    def by(self) -> str:
        """The driver's user, host and pid, for messages."""
        who = f"{self.user}@{self.host}" if self.user else self.host
        return f"{who}, pid {self.pid}"


def current_run(storage: Storage) -> CurrentRun | None:
    """The run that is writing to a store or was killed; None if the last run ended normally.

    For a lease of another machine it waits up to `HEARTBEAT_WAIT_SECONDS` for the heartbeat to
    change, because the clocks of two machines are never compared.
    """
    return _of_lock(storage) if storage.local else _of_lease(storage)


def _of_lock(storage: Storage) -> CurrentRun | None:
    holder = read_lock(storage)
    if holder is None:
        return None
    return _run(holder, is_locked(storage) if holder.alive is None else holder.alive)


def _of_lease(storage: Storage) -> CurrentRun | None:
    first = read_lease(storage)
    if first is None:
        return None
    if first.alive is not None:
        return _run(first, first.alive, first.heartbeat)
    end = time.monotonic() + HEARTBEAT_WAIT_SECONDS
    while time.monotonic() < end:
        time.sleep(POLL_SECONDS)
        lease = read_lease(storage)
        if lease is None:  # the run has ended
            return None
        if lease.heartbeat != first.heartbeat:
            return _run(lease, True, lease.heartbeat)
    return _run(first, None, first.heartbeat)


def _run(holder: Holder, alive: bool | None, heartbeat: str | None = None) -> CurrentRun:
    return CurrentRun(
        state="silent" if alive is None else "running" if alive else "stopped",
        user=holder.user,
        host=holder.host,
        pid=holder.pid,
        since=holder.since,
        heartbeat=heartbeat,
        progress=holder.progress,
    )
