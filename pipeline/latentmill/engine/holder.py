"""The content of a store's lock file or lease: who is writing, and how far that run is.

`latentmill status` reads it from another process or machine, without importing Ray or torch.
"""

from __future__ import annotations

import datetime
import getpass
import os
import socket
from pathlib import Path

from pydantic import BaseModel, ConfigDict


class RunProgress(BaseModel):
    """How far a run is. Units that were committed before the run count as done.

    Attributes:
        units_in_flight: Units that workers have and have not committed yet.
        items_done: Items that are encoded, skipped or failed, including those of units in flight.
        audio_seconds: Audio that is done, including that of units in flight.
        total_seconds: Audio of the whole plan. Lengths that the plan only estimates are corrected
            by the lengths found in the units so far.
        x_real_time: Speed over the last two minutes, or None while it is unknown.
        seconds_left: Time left at that speed, or None while it is unknown.
    """

    model_config = ConfigDict(frozen=True)

    units: int
    units_done: int
    units_in_flight: int
    items: int
    items_done: int
    failed: int
    audio_seconds: float
    total_seconds: float
    x_real_time: float | None = None
    seconds_left: float | None = None

    @property
    def share(self) -> float:
        """Share of the audio that is done, 0 to 1."""
        return min(self.audio_seconds / self.total_seconds, 1.0) if self.total_seconds else 0.0


class Holder(BaseModel):
    """The process of a run.

    Attributes:
        process: See `process_stamp`.
        since: When the process locked the store, in UTC, by the clock of its host.
        progress: None before the first unit.
    """

    model_config = ConfigDict(frozen=True)

    host: str
    pid: int
    process: str | None
    user: str = ""
    since: str = ""
    progress: RunProgress | None = None

    @property
    def where(self) -> str:
        """The process and host, for messages."""
        return f"process {self.pid} on {self.host}"

    @property
    def alive(self) -> bool | None:
        """Whether the process is running, or None if this machine cannot know."""
        if self.process is None:
            return None
        if self.process == process_stamp(self.pid):
            return True
        return False if _machine(self.process) == _machine(process_stamp(os.getpid())) else None


def this_process() -> Holder:
    """This process as the holder of a store, starting now."""
    return Holder(
        host=socket.gethostname(),
        pid=os.getpid(),
        process=process_stamp(os.getpid()),
        user=_user(),
        since=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    )


def process_stamp(pid: int) -> str | None:
    """A string that identifies a process across machines and reboots (Linux only).

    It holds the boot id, the process namespace, the pid and the start time. None if there is no
    such process.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        namespace = Path("/proc/self/ns/pid").readlink()
        state, *stat = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except (OSError, IndexError, ValueError):
        return None
    return None if state == "Z" else f"{boot} {namespace} {pid} {stat[18]}"


def _machine(stamp: str | None) -> str | None:
    return None if stamp is None else stamp.rsplit(" ", 2)[0]


def _user() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # the user has no name, as in some containers
        return f"user {os.getuid()}"
