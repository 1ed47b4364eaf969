"""Finds the item that kills its workers, by loading each item in a separate process first.

A small server process without threads and GPUs imports the decoders and forks once per item, so
that a trial costs little more than loading. It runs as
`python -m latentmill.engine.trial_load FD` and sends a line when it is ready.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from pydantic import TypeAdapter

from latentmill.audio import open_audio, prepare
from latentmill.audio.media import is_remote
from latentmill.sources.base import Item, Segment
from latentmill.sources.metadata import read_metadata
from latentmill.sources.reading import UnitReader
from latentmill.storage.closeable import Closeable

HANG_SECONDS = 120.0
START_SECONDS = 300.0
FETCH_SECONDS = 3600.0
"""During this time, fetching a remote recording does not count as hung, even if no bytes arrive:
its requests have their own limits."""


@dataclass(frozen=True)
class Trial:
    """Request to the server."""

    item: Item
    sample_rate: int
    channels: int
    allow_truncated: bool
    hang_seconds: float


@dataclass(frozen=True)
class TrialResult:
    """How the child process of a trial ended."""

    signal: int = 0
    exit_code: int = 0
    hung: bool = False

    def reason(self, hang_seconds: float) -> str | None:
        """Why a worker must not load the item, or None if it may."""
        if self.hung:
            return f"loading it hangs: no progress for {hang_seconds:g} s"
        if self.signal:
            name = signal.Signals(self.signal).name
            hint = ", possibly out of memory" if self.signal == signal.SIGKILL else ""
            return f"loading it kills the process ({name}{hint})"
        if self.exit_code:
            return f"loading it ends the process (exit code {self.exit_code})"
        return None


class TrialStartError(RuntimeError):
    """The process that loads items on trial does not start, which is not the fault of an item."""


_TRIAL = TypeAdapter(Trial)
_RESULT = TypeAdapter(TrialResult)


class TrialLoader(Closeable):
    """Loads items on trial. A context manager; its server starts with the first trial.

    A load that makes no progress for `hang_seconds` counts as hung. `on_progress` is called
    whenever a trial reports that it goes on or has ended.
    """

    def __init__(
        self,
        sample_rate: int,
        channels: int,
        *,
        allow_truncated: bool = False,
        hang_seconds: float = HANG_SECONDS,
        on_progress: Callable[[], object] = lambda: None,
    ) -> None:
        self._settings = (sample_rate, channels, allow_truncated, hang_seconds)
        self._hang_seconds = hang_seconds
        self._on_progress = on_progress
        self._server: subprocess.Popen[bytes] | None = None
        self._socket: socket.socket | None = None

    def failure_reason(self, item: Item) -> str | None:
        """Load an item on trial. Returns why no worker may load it, or None.

        Ordinary failures are not reported here; the worker reports them.

        Raises:
            TrialStartError: The server does not start, which is not the fault of an item.
        """
        if self._socket is None:
            self._start()
        assert self._socket is not None
        # A timeout between two bytes: the server times the trial itself and sends keep-alives.
        self._socket.settimeout(START_SECONDS + self._hang_seconds)
        try:
            self._socket.sendall(_TRIAL.dump_json(Trial(item, *self._settings)) + b"\n")
            answer = _line(self._socket, self._on_progress)
        except OSError:
            answer = b""
        if not answer:  # the server was killed during the trial
            self.close()
            return TrialResult(signal=signal.SIGKILL).reason(self._hang_seconds)
        return _RESULT.validate_json(answer).reason(self._hang_seconds)

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None
        if self._server is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._server.wait(5)
            self._server.kill()
            self._server.wait()
            self._server = None

    def _start(self) -> None:
        self._socket, theirs = socket.socketpair()
        self._socket.settimeout(START_SECONDS)
        # The modules of this process: -P leaves out the current folder, which may have others.
        paths = os.pathsep.join(map(os.path.abspath, sys.path))
        with theirs:
            self._server = subprocess.Popen(  # noqa: S603  this module
                [sys.executable, "-P", "-m", "latentmill.engine.trial_load", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                env={**os.environ, "PYTHONPATH": paths},
            )
        try:
            ready = _line(self._socket)
        except OSError:
            ready = b""
        if not ready:
            self.close()
            raise TrialStartError("the process that loads items on trial does not start")


def _line(connection: socket.socket, on_bytes: Callable[[], object] = lambda: None) -> bytes:
    """Read one line; empty at the end of the connection. `on_bytes` is called for each part."""
    line = bytearray()
    while not line.endswith(b"\n"):
        part = connection.recv(1 << 16)
        if not part:
            return b""
        line += part
        on_bytes()
    return bytes(line)


def serve(connection: socket.socket) -> None:
    """Answer trials until the other side closes."""
    for module in ("av", "soundfile", "soxr"):
        __import__(module)  # once, before the forks
    connection.sendall(b"ready\n")
    while line := _line(connection):
        trial = _TRIAL.validate_json(line)
        result = _try_load(trial, connection)
        if result is None:
            return
        connection.sendall(_RESULT.dump_json(result) + b"\n")


def _try_load(trial: Trial, connection: socket.socket) -> TrialResult | None:
    """Load an item in a child process. Returns None if the worker has closed the connection."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read)
        connection.close()
        with contextlib.suppress(OSError):  # if memory runs out, the kernel kills this child first
            Path("/proc/self/oom_score_adj").write_text("1000")
        try:
            _load(trial, write)
        finally:
            os._exit(0)  # the worker reports ordinary failures
    os.close(write)
    hung = closed = False
    try:
        while True:
            ready, _, _ = select.select([read, connection.fileno()], [], [], trial.hang_seconds)
            hung, closed = not ready, connection.fileno() in ready
            if hung or closed or not os.read(read, 4096):
                break
            connection.sendall(b" ")  # keep-alive; JSON ignores it before the result
    finally:
        os.close(read)
    if hung or closed:
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if closed:
        return None
    code = os.waitstatus_to_exitcode(status)
    return TrialResult(signal=max(-code, 0), exit_code=max(code, 0), hung=hung)


def _load(trial: Trial, progress: int) -> None:
    """Load an item to its end as a worker does. Each step writes a byte to a pipe."""
    read_metadata(trial.item)
    os.write(progress, b".")
    part = trial.item.segment or Segment(0.0)

    def step() -> None:
        os.write(progress, b".")

    with (
        UnitReader([trial.item], allow_changed=True, on_bytes=step) as reader,
        contextlib.ExitStack() as stack,
    ):
        with _keep_alive(trial, progress):
            media = stack.enter_context(reader.open(trial.item))
        stream = open_audio(
            media,
            start=part.start,
            duration=part.duration,
            allow_truncated=trial.allow_truncated,
        )
        waveform = prepare(stream, sample_rate=trial.sample_rate, channels=trial.channels)
        stream.on_block = step
        for _ in waveform.blocks():
            pass


@contextlib.contextmanager
def _keep_alive(trial: Trial, progress: int) -> Iterator[None]:
    """Write keep-alive bytes while a remote item is fetched, so that it does not count as hung."""
    fetched = threading.Event()
    end = time.monotonic() + (FETCH_SECONDS if is_remote(trial.item.uri) else 0.0)

    def write() -> None:
        while time.monotonic() < end and not fetched.wait(trial.hang_seconds / 4):
            os.write(progress, b".")

    thread = threading.Thread(target=write, daemon=True)
    thread.start()
    try:
        yield
    finally:
        fetched.set()
        thread.join()
    os.write(progress, b".")


def main() -> None:
    """Serve on the socket whose file descriptor is the only argument."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the worker handles Ctrl-C
    with socket.socket(fileno=int(sys.argv[1])) as connection:
        serve(connection)


if __name__ == "__main__":
    main()
