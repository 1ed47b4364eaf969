"""One fault at one operation of a store's storage, and everything that a process does after it.

Operations are counted as a run makes them: those of `Storage` itself for a store on a local disk,
the requests to the file system below it for one in a bucket, whose answers may be lost and whose
failures are tried again.
"""

from __future__ import annotations

import contextlib
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from latentmill.engine import holder, lease
from latentmill.errors import StorageError
from latentmill.storage import objects, remote, storage
from latentmill.storage.storage import Storage

READS = (
    "exists",
    "list",
    "folders",
    "read",
    "read_if_exists",
    "read_range",
    "read_ranges",
    "version",
)
WRITES = ("write", "create", "replace", "publish", "delete")
REQUESTS = ("info", "ls", "cat_file", "cat_ranges")
CHANGES = ("pipe_file", "put_file", "rm_file")

# What happens at an operation. A stop before a read leaves what a stop before the next write does.
WRITE_MODES = ("stop", "torn", "lost", "transient", "permanent", "interrupt")
READ_MODES = ("transient", "permanent")


class Killed(BaseException):
    """The process is gone: it does nothing more, not even clean up."""


class Faults:
    """Counts operations, and does something wrong at one of them.

    Args:
        mode: What; None: nothing.
        at: The number of the operation, from 0.
        remote: Whether the operations are requests to a bucket.

    Attributes:
        seen: Every operation, such as `write plan/plan.json`.
    """

    def __init__(self, mode: str | None = None, at: int = -1, *, remote: bool = False) -> None:
        self.mode, self.at, self.remote = mode, at, remote
        self.seen: list[tuple[str, str]] = []
        self.dead = False
        self._broken: tuple[str, str] | None = None
        self._lock = threading.Lock()
        self._inside = threading.local()

    def call(
        self, verb: str, path: str, action: Callable[[], Any], tear: Callable[[], None]
    ) -> Any:
        """Make an operation, or what becomes of it."""
        if getattr(self._inside, "operation", False):  # part of one that was counted
            return action()
        if self.dead:
            # The thread of a lease dies with its process; here it has to go on by itself.
            if threading.current_thread().name == "lease":
                raise StorageError("gone")
            raise Killed
        with self._lock:
            hit = len(self.seen) == self.at
            self.seen.append((verb, path))
            if hit and self.mode == "permanent":
                self._broken = (verb, path)
        self._inside.operation = True
        try:
            if self._broken == (verb, path):
                raise self._error(passes=False)
            return self._struck(action, tear) if hit else action()
        finally:
            self._inside.operation = False

    def _struck(self, action: Callable[[], Any], tear: Callable[[], None]) -> Any:
        if self.mode == "interrupt":
            raise KeyboardInterrupt
        if self.mode == "transient":
            raise self._error(passes=True)
        if self.mode == "lost":
            action()
            raise self._error(passes=True)
        self.dead = True
        if self.mode == "torn":
            tear()
        raise Killed

    def _error(self, *, passes: bool) -> Exception:
        if not self.remote:
            return StorageError("Cannot reach the disk: Input/output error.")
        return ConnectionResetError("cut") if passes else PermissionError(13, "Permission denied")


def is_write(verb: str) -> bool:
    """Whether an operation changes the store."""
    return verb in WRITES or verb in CHANGES


@contextmanager
def faults_on(faults: Faults) -> Iterator[None]:
    """Let the operations of all stores that are opened inside go through `faults`."""
    with pytest.MonkeyPatch.context() as patch:
        if faults.remote:
            opened = remote.open_for
            patch.setattr(storage, "open_for", lambda *a: _through(faults, *opened(*a)))
            patch.setattr(objects, "cat_ranges", _ranges_through(faults, objects.cat_ranges))
            patch.setattr(remote, "FIRST_PAUSE", 0.0)
        else:
            for name in (*READS, *WRITES, "open"):
                if hasattr(Storage, name):
                    patch.setattr(Storage, name, _counted(faults, name, getattr(Storage, name)))
        _stay_dead(faults, patch)
        # As if inside were a process of its own: the next one finds its lease dead.
        stamp, mark = holder.process_stamp, uuid.uuid4().hex[:8]
        patch.setattr(holder, "process_stamp", lambda pid: f"{stamp(pid)}-{mark}")
        timing = lease.Timing(period=600.0, dead_after=3600.0, settle=0.0, poll=0.01)
        patch.setattr(lease, "Timing", lambda: timing)
        yield


def _counted(faults: Faults, name: str, method: Callable[..., Any]) -> Callable[..., Any]:
    def call(self: Storage, *args: Any, **kwargs: Any) -> Any:
        path = str(args[1] if name == "publish" else args[0])

        def tear() -> None:
            if not self.local or name not in WRITES or name == "delete":
                return
            data = args[0].read_bytes() if name == "publish" else args[1]
            self.scratch_folder.mkdir(parents=True, exist_ok=True)
            left = self.scratch_folder / f"{uuid.uuid4().hex}.{path.replace('/', '.')}"
            left.write_bytes(data[: len(data) // 2])

        if name == "read_ranges":
            path = str([one[0] for one in args[0]])
        return faults.call(name, path, lambda: method(self, *args, **kwargs), tear)

    if name != "open":
        return call

    @contextmanager
    def opened(self: Storage, path: str) -> Iterator[Any]:
        faults.call("open", path, lambda: None, lambda: None)
        with method(self, path) as file:
            yield file

    return opened


def _through(faults: Faults, fs: Any, path: str) -> tuple[Any, str]:
    return _FileSystem(fs, faults), path


def _ranges_through(faults: Faults, cat_ranges: Callable[..., Any]) -> Callable[..., Any]:
    """Count the ranges of a file system once, whichever client reads them."""

    def call(fs: Any, *columns: Any) -> Any:
        own = fs._own if isinstance(fs, _FileSystem) else fs
        key = str(columns[0]).split("/", 2)[-1]
        return faults.call("cat_ranges", key, lambda: cat_ranges(own, *columns), lambda: None)

    return call


class _FileSystem:
    """A file system whose requests go through `Faults`."""

    def __init__(self, fs: Any, faults: Faults) -> None:
        self._own, self._faults = fs, faults

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._own, name)
        if name not in (*REQUESTS, *CHANGES):
            return method

        def call(*args: Any, **kwargs: Any) -> Any:
            path = str(args[1] if name == "put_file" else args[0])

            def tear() -> None:
                if name == "put_file" and hasattr(self._own, "call_s3"):
                    bucket, _, key = path.partition("/")
                    self._own.call_s3("create_multipart_upload", Bucket=bucket, Key=key)

            key = path.split("/", 2)[-1]
            return self._faults.call(name, key, lambda: method(*args, **kwargs), tear)

        return call


def _write_again(path: Path, data: bytes) -> None:
    """Another thread removes the folder at any moment, if it is empty."""
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):
            path.write_bytes(data)
            return


def _stay_dead(faults: Faults, patch: pytest.MonkeyPatch) -> None:
    """A process that was killed leaves its temporary files."""
    scratch_file, clear_scratch = Storage.scratch_file, Storage.clear_scratch

    @contextmanager
    def scratch_file_(self: Storage, path: str) -> Iterator[Path]:
        left: bytes | None = None
        with scratch_file(self, path) as temporary:
            try:
                yield temporary
            except Killed:
                with contextlib.suppress(FileNotFoundError):
                    left = temporary.read_bytes()
                killed = temporary
        if faults.dead and left is not None:
            _write_again(killed, left)
        if faults.dead:
            raise Killed

    def clear_scratch_(self: Storage) -> None:
        if not faults.dead:
            clear_scratch(self)

    patch.setattr(Storage, "scratch_file", scratch_file_)
    patch.setattr(Storage, "clear_scratch", clear_scratch_)
