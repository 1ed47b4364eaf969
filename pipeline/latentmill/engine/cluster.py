"""Connecting to Ray: an existing cluster, or one started in this process."""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import ray

from latentmill.errors import ConfigError
from latentmill.text.log import get_logger

_log = get_logger("engine")

# Units carry no audio, so the object store can be as small as Ray allows. Load tasks send audio.
OBJECT_STORE_BYTES = 100 * 2**20
PAYLOAD_BYTES = 1 << 30
CONNECT_SECONDS = 10.0
HEAD_CONNECT_SECONDS = 3.0
STARTS = 3  # Ray gives its processes 20 and 30 s to start, and has no setting for it
SOCKET_PATH_BYTES = 107 if sys.platform == "linux" else 103
FREE_BYTES = 1 << 20  # for Ray's sockets, ports and first logs


@dataclass(frozen=True)
class Cluster:
    """The Ray cluster of this run, with the number of CPUs and GPUs of each node."""

    embedded: bool
    node_cpus: tuple[int, ...]
    node_gpus: tuple[int, ...]

    @property
    def gpus(self) -> int:
        return sum(self.node_gpus)


@contextlib.contextmanager
def connect(address: str | None, *, payloads: bool = False) -> Iterator[Cluster]:
    """Connect to Ray for a run.

    An existing connection is used if there is one, otherwise the cluster at `address` or
    RAY_ADDRESS (which Ray sets under `ray job submit`); both are left running. Without either, Ray
    is started in this process and stopped at the end. `payloads` makes its object store large
    enough for audio.
    """
    if ray.is_initialized():
        yield describe()
        return
    address = address or os.environ.get("RAY_ADDRESS")
    if address is None:
        _check_temporary_folder()
        _check_home()
    began = time.monotonic()
    with _kept_sigterm() as restore_sigterm:
        try:
            _init(address, PAYLOAD_BYTES if payloads else OBJECT_STORE_BYTES)
        except Exception as error:  # Ray also raises plain exceptions
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            if address is None:
                logs = Path(_temporary_folder()[1], "ray", "session_latest", "logs")
                raise ConfigError(
                    f"Ray did not start on this machine ({reason}): run the command again when "
                    f"the machine is less busy, or see Ray's logs in {logs}."
                ) from error
            raise ConfigError(
                f"Cannot connect to Ray at {address} ({reason}): check the address, and that the "
                "cluster is running."
            ) from error
        except SystemExit as error:  # Ray raises this on SIGTERM while it starts
            raise KeyboardInterrupt from error
        try:
            restore_sigterm()
            cluster = describe(embedded=address is None)
            _log.debug(
                "%s in %.1f s: %d CPU cores, %d GPUs",
                "started Ray" if address is None else f"connected to Ray at {address}",
                time.monotonic() - began,
                sum(cluster.node_cpus),
                cluster.gpus,
            )
            yield cluster
        finally:
            if head_answers():
                ray.shutdown()
            else:  # shutdown would wait for the head until Ray kills this process
                atexit.unregister(ray.shutdown)


def _temporary_folder() -> tuple[str, str]:
    """The folder of Ray's sockets and logs, after the environment variable that sets it."""
    names = ("RAY_TMPDIR", "TMPDIR") if sys.platform == "linux" else ("RAY_TMPDIR",)
    found = next((name for name in names if name in os.environ), None)
    return found or "RAY_TMPDIR", os.environ[found] if found else "/tmp"  # noqa: S108  as Ray does


def _check_temporary_folder() -> None:
    """Check Ray's folder here, because Ray reports some of these errors after half a minute."""
    variable, folder = _temporary_folder()
    fix = "Set RAY_TMPDIR to a writable folder with a short path, such as RAY_TMPDIR=/tmp."
    session = f"session_{'0' * len('2026-01-31_23-59-59_123456')}_{os.getpid()}"
    too_long = len(os.fsencode(f"{folder}/ray/{session}/sockets/plasma_store")) - SOCKET_PATH_BYTES
    if too_long > 0:
        raise ConfigError(
            f"Ray cannot start: {variable}={folder} is {too_long} bytes too long, because a Unix "
            f"socket's path has at most {SOCKET_PATH_BYTES} bytes. {fix}"
        )
    # Ray's processes resolve a relative path against another folder.
    relative = not Path(folder).is_absolute()
    if reason := "not an absolute path" if relative else _not_writable(Path(folder, "ray")):
        raise ConfigError(f"Ray cannot start: {variable}={folder} cannot be used ({reason}). {fix}")


def _check_home() -> None:
    """Check HOME: Ray writes a new token for its connections there, unless it has one."""
    given = {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & set(os.environ)
    if given or os.environ.get("RAY_AUTH_MODE", "token") != "token":
        return
    try:
        home = Path.home()
        has_token = (home / ".ray" / "auth_token").is_file()
        reason = None if has_token else _not_writable(home / ".ray")
    except RuntimeError:  # an unknown user, as in some containers
        home, reason = Path(), "it is not set"
    if reason:
        raise ConfigError(
            f"Ray cannot start: HOME={home} cannot be used ({reason}), and Ray keeps a token in "
            "its .ray folder. Set HOME to a writable folder, such as HOME=/tmp."
        )


def _not_writable(folder: Path) -> str | None:
    """The reason why files cannot be written to a folder, or None. Creates the folder."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(FREE_BYTES))
            file.flush()
    except OSError as error:
        return error.strerror or str(error)
    return None


def _init(address: str | None, object_store_bytes: int) -> None:
    if address is not None:
        host, _, port = address.rpartition(":")
        if host and port.isdigit() and "://" not in address:  # Ray would retry for two minutes
            socket.create_connection((host, int(port)), CONNECT_SECONDS).close()
        ray.init(address=address, logging_level=logging.WARNING, log_to_driver=False)
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    for attempt in range(1, STARTS + 1):
        try:
            ray.init(
                address="local",
                include_dashboard=False,
                object_store_memory=object_store_bytes,
                logging_level=logging.ERROR,
                log_to_driver=False,
            )
        except Exception as error:  # Ray's own is a plain exception
            if attempt == STARTS or "timed out during startup" not in str(error):
                raise
            _log.warning(
                "Ray did not start in time, as happens on a busy machine (start %d of %d): trying "
                "again.",
                attempt,
                STARTS,
            )
        else:
            return


@contextlib.contextmanager
def _kept_sigterm() -> Iterator[Callable[[], None]]:
    """Yield a function that restores the program's SIGTERM handler, which ray.init replaces."""
    before = signal.getsignal(signal.SIGTERM)
    can_set = threading.current_thread() is threading.main_thread() and before is not None

    def restore() -> None:
        if can_set and callable(before):  # else keep Ray's handler: it ends Ray's processes
            signal.signal(signal.SIGTERM, before)

    try:
        yield restore
    finally:
        if can_set:
            signal.signal(signal.SIGTERM, before)


def head_answers() -> bool:
    """Whether the head of the cluster accepts connections."""
    # A Ray client (ray://) has no such address: it talks to a server next to the head.
    address = getattr(ray.get_runtime_context(), "gcs_address", None)
    if address is None:
        return True
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), HEAD_CONNECT_SECONDS).close()
    except OSError:
        return False
    return True


def describe(*, embedded: bool = False) -> Cluster:
    """The cluster's nodes that are alive now."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
    return Cluster(
        embedded,
        node_cpus=tuple(int(node.get("CPU", 0)) for node in nodes),
        node_gpus=tuple(int(node.get("GPU", 0)) for node in nodes),
    )
