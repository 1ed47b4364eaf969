"""Who is writing to a store, and how far that run is: what its lock file or lease says of it.

`latentmill status` reads it from another process or machine. It imports no Ray and no torch.
"""

from __future__ import annotations

import datetime
import getpass
import os
import socket
from pathlib import Path

from pydantic import BaseModel, ConfigDict


class RunProgress(BaseModel):
    """How far a run is; units that were committed before it count as done.

    Attributes:
        units_in_flight: Units that workers have and have not committed yet.
        items_done: Items that are encoded, skipped or failed, in units in flight too.
        audio_seconds: Audio done, in units in flight too.
        total_seconds: Audio of the whole plan. Lengths that the plan only estimates are corrected
            by what was found in the units so far.
        x_real_time: Speed over the last two minutes; None as long as it is unknown.
        seconds_left: By that speed; None as long as it is unknown.
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
        since: When it took the store, UTC, by the clock of its host.
        progress: None before its first unit.
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
        """The process, for people."""
        return f"process {self.pid} on {self.host}"

    @property
    def alive(self) -> bool | None:
        """Whether the process runs; None if this machine cannot tell."""
        if self.process is None:
            return None
        if self.process == process_stamp(self.pid):
            return True
        return False if _machine(self.process) == _machine(process_stamp(os.getpid())) else None


def this_process() -> Holder:
    """This process as the holder of a store, from now on."""
    return Holder(
        host=socket.gethostname(),
        pid=os.getpid(),
        process=process_stamp(os.getpid()),
        user=_user(),
        since=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    )


def process_stamp(pid: int) -> str | None:
    """What tells a process from all others, of other machines and times too; Linux has it.

    Boot and process namespace, then the process and its start. None if there is no such process.
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
    except (OSError, KeyError):  # a container whose user has no name
        return f"user {os.getuid()}"
