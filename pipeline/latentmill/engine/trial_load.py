"""Finding the item that kills its workers: decode each one in a process of its own first.

A small server process, free of threads and GPUs, has imported the decoders and forks once per
item, so that a trial costs little more than the decoding. It runs as
`python -m latentmill.engine.trial_load FD`.
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
from collections.abc import Iterator
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
"""How long fetching a recording from elsewhere may take; the network's time is no hang."""


@dataclass(frozen=True)
class Trial:
    """What the server is asked to decode, and how."""

    item: Item
    sample_rate: int
    channels: int
    allow_truncated: bool
    hang_seconds: float


@dataclass(frozen=True)
class Verdict:
    """How the process of a trial ended."""

    signal: int = 0
    exit_code: int = 0
    hung: bool = False

    def reason(self, hang_seconds: float) -> str | None:
        """Why the item must not be decoded by a worker; None if it may be."""
        if self.hung:
            return f"decoding it hangs: nothing came for {hang_seconds:g} s"
        if self.signal:
            name = signal.Signals(self.signal).name
            hint = ", as when memory runs out" if self.signal == signal.SIGKILL else ""
            return f"decoding it kills the process ({name}{hint})"
        if self.exit_code:
            return f"decoding it ends the process (exit code {self.exit_code})"
        return None


_TRIAL = TypeAdapter(Trial)
_VERDICT = TypeAdapter(Verdict)


class Trials(Closeable):
    """Decodes items on trial. A context manager; its server starts with the first trial.

    Args:
        sample_rate: Of the model.
        channels: Of the model.
        allow_truncated: As in the run.
        hang_seconds: How long a decoder may give nothing.
    """

    def __init__(
        self,
        sample_rate: int,
        channels: int,
        *,
        allow_truncated: bool = False,
        hang_seconds: float = HANG_SECONDS,
    ) -> None:
        self._settings = (sample_rate, channels, allow_truncated, hang_seconds)
        self._hang_seconds = hang_seconds
        self._server: subprocess.Popen[bytes] | None = None
        self._socket: socket.socket | None = None

    def reason_against(self, item: Item) -> str | None:
        """Decode an item on trial; gives why no worker should, or None.

        An item that fails in an orderly way is none of our business: a worker says so, too.
        """
        request = _TRIAL.dump_json(Trial(item, *self._settings))
        answer = self._ask(request)
        if answer is None:  # the server itself is gone, and the item with it
            self.close()
            return Verdict(signal=signal.SIGKILL).reason(self._hang_seconds)
        return _VERDICT.validate_json(answer).reason(self._hang_seconds)

    def close(self) -> None:
        """End the server."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None
        if self._server is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._server.wait(5)
            self._server.kill()
            self._server.wait()
            self._server = None

    def _ask(self, request: bytes) -> bytes | None:
        if self._socket is None:
            self._start()
        assert self._socket is not None
        # Of silence: the server looks after the time itself, and gives signs of life.
        self._socket.settimeout(START_SECONDS + self._hang_seconds)
        try:
            self._socket.sendall(request + b"\n")
            return _line(self._socket) or None
        except OSError:
            return None

    def _start(self) -> None:
        self._socket, theirs = socket.socketpair()
        with theirs:
            self._server = subprocess.Popen(  # noqa: S603  ourselves
                [sys.executable, "-m", "latentmill.engine.trial_load", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
            )


def _line(connection: socket.socket) -> bytes:
    """One line; empty at the end of the connection."""
    line = bytearray()
    while not line.endswith(b"\n"):
        part = connection.recv(1 << 16)
        if not part:
            return b""
        line += part
    return bytes(line)


def serve(connection: socket.socket) -> None:
    """Answer trials until the other side closes."""
    for module in ("av", "soundfile", "soxr"):
        __import__(module)  # once, before the forks
    while line := _line(connection):
        trial = _TRIAL.validate_json(line)
        verdict = _tried(trial, connection)
        if verdict is None:
            return
        connection.sendall(_VERDICT.dump_json(verdict) + b"\n")


def _tried(trial: Trial, connection: socket.socket) -> Verdict | None:
    """Decode an item in a child; None if our own master died meanwhile."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read)
        connection.close()
        with contextlib.suppress(OSError):  # if memory runs out, this process goes first
            Path("/proc/self/oom_score_adj").write_text("1000")
        try:
            _decode(trial, write)
        finally:
            os._exit(0)  # an orderly failure is no reason against the item
    os.close(write)
    hung = deserted = False
    try:
        while True:
            ready, _, _ = select.select([read, connection.fileno()], [], [], trial.hang_seconds)
            hung, deserted = not ready, connection.fileno() in ready
            if hung or deserted or not os.read(read, 4096):
                break
            connection.sendall(b" ")  # a sign of life; in front of the verdict it says nothing
    finally:
        os.close(read)
    if hung or deserted:
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if deserted:
        return None
    code = os.waitstatus_to_exitcode(status)
    return Verdict(signal=max(-code, 0), exit_code=max(code, 0), hung=hung)


def _decode(trial: Trial, progress: int) -> None:
    """Read an item to its end, as a worker does; each step writes a byte to a pipe."""
    read_metadata(trial.item)
    os.write(progress, b".")
    part = trial.item.segment or Segment(0.0)
    with UnitReader([trial.item], allow_changed=True) as reader, contextlib.ExitStack() as stack:
        with _signs_of_life(trial, progress):
            media = stack.enter_context(reader.open(trial.item))
        stream = open_audio(
            media,
            start=part.start,
            duration=part.duration,
            allow_truncated=trial.allow_truncated,
        )
        waveform = prepare(stream, sample_rate=trial.sample_rate, channels=trial.channels)
        for _ in waveform.blocks():
            os.write(progress, b".")


@contextlib.contextmanager
def _signs_of_life(trial: Trial, progress: int) -> Iterator[None]:
    """Keeps a slow fetch from being taken for a decoder that hangs."""
    fetched = threading.Event()
    end = time.monotonic() + (FETCH_SECONDS if is_remote(trial.item.uri) else 0.0)

    def give() -> None:
        while time.monotonic() < end and not fetched.wait(trial.hang_seconds / 4):
            os.write(progress, b".")

    thread = threading.Thread(target=give, daemon=True)
    thread.start()
    try:
        yield
    finally:
        fetched.set()
        thread.join()
    os.write(progress, b".")


def main() -> None:
    """Serve on the socket whose number is the only argument."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a Ctrl-C is our master's business
    with socket.socket(fileno=int(sys.argv[1])) as connection:
        serve(connection)


if __name__ == "__main__":
    main()
