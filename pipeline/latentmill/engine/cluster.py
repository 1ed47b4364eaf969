"""Finding the Ray to run on: a cluster that is named, or one embedded in this process."""

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
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import ray

from latentmill.errors import ConfigError

# Units carry no payloads, so the object store may be as small as Ray allows; decode tasks do.
OBJECT_STORE_BYTES = 100 * 2**20
PAYLOAD_BYTES = 1 << 30
CONNECT_SECONDS = 10.0
HEAD_CONNECT_SECONDS = 3.0
SOCKET_PATH_BYTES = 107 if sys.platform == "linux" else 103
FREE_BYTES = 1 << 20  # Ray's sockets, ports and first logs


@dataclass(frozen=True)
class Cluster:
    """The Ray that this run uses: how many CPUs and GPUs each of its nodes has."""

    embedded: bool
    node_cpus: tuple[int, ...]
    node_gpus: tuple[int, ...]

    @property
    def gpus(self) -> int:
        """GPUs of all nodes."""
        return sum(self.node_gpus)


@contextlib.contextmanager
def connect(address: str | None, *, payloads: bool = False) -> Iterator[Cluster]:
    """Connect to Ray for a run.

    A Ray that is already connected or that is named (by `address` or RAY_ADDRESS, which Ray sets
    under `ray job submit`) is used as it is and left running. Else one is started in this process
    and stopped at the end; with `payloads` its object store has room for audio.

    Raises:
        ConfigError: The named cluster cannot be reached, or Ray cannot start here.
    """
    if ray.is_initialized():
        yield describe()
        return
    address = address or os.environ.get("RAY_ADDRESS")
    if address is None:
        _check_temporary_folder()
        _check_home()
    with _own_sigterm() as take_back:
        try:
            _init(address, PAYLOAD_BYTES if payloads else OBJECT_STORE_BYTES)
        except Exception as error:  # Ray raises plain ones, too
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            if address is None:
                logs = Path(_temporary_folder()[1], "ray", "session_latest", "logs")
                raise ConfigError(
                    f"Ray cannot start on this machine ({reason}): its logs in {logs} say why."
                ) from error
            raise ConfigError(
                f"Ray at {address} cannot be used ({reason}): check the address and that the "
                "cluster runs."
            ) from error
        except SystemExit as error:  # Ray's answer to a SIGTERM while it starts
            raise KeyboardInterrupt from error
        try:
            take_back()
            yield describe(embedded=address is None)
        finally:
            if head_answers():
                ray.shutdown()
            else:  # it would wait for the head, until Ray ends this process
                atexit.unregister(ray.shutdown)


def _temporary_folder() -> tuple[str, str]:
    """Where Ray keeps its sockets and logs, and the variable that decides it."""
    names = ("RAY_TMPDIR", "TMPDIR") if sys.platform == "linux" else ("RAY_TMPDIR",)
    found = next((name for name in names if name in os.environ), None)
    return found or "RAY_TMPDIR", os.environ[found] if found else "/tmp"  # noqa: S108  as Ray does


def _check_temporary_folder() -> None:
    """Find out before Ray does, which reports some of these faults after half a minute."""
    variable, folder = _temporary_folder()
    fix = "Set RAY_TMPDIR to a writable folder with a short path, such as RAY_TMPDIR=/tmp."
    session = f"session_{'0' * len('2026-01-31_23-59-59_123456')}_{os.getpid()}"
    too_long = len(os.fsencode(f"{folder}/ray/{session}/sockets/plasma_store")) - SOCKET_PATH_BYTES
    if too_long > 0:
        raise ConfigError(
            f"Ray cannot start: {variable}={folder} is {too_long} bytes too long, because a Unix "
            f"socket's path has at most {SOCKET_PATH_BYTES} bytes. {fix}"
        )
    relative = not Path(folder).is_absolute()  # for Ray's processes it is another folder
    if reason := "not an absolute path" if relative else _not_writable(Path(folder, "ray")):
        raise ConfigError(f"Ray cannot start: {variable}={folder} cannot be used ({reason}). {fix}")


def _check_home() -> None:
    """Ray writes a new token for its connections to HOME, unless it has one."""
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
    """Why files cannot be written to a folder, which is made if need be."""
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
        _knock(address)
        ray.init(address=address, logging_level=logging.WARNING, log_to_driver=False)
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    ray.init(
        address="local",
        include_dashboard=False,
        object_store_memory=object_store_bytes,
        logging_level=logging.ERROR,
        log_to_driver=False,
    )


def _knock(address: str) -> None:
    """Find out at once that nobody is at HOST:PORT; Ray tries for two minutes."""
    host, _, port = address.rpartition(":")
    if host and port.isdigit() and "://" not in address:
        socket.create_connection((host, int(port)), CONNECT_SECONDS).close()


@contextlib.contextmanager
def _own_sigterm() -> Iterator[Callable[[], None]]:
    """Give the program its SIGTERM handler back, which ray.init replaces by its own."""
    before = signal.getsignal(signal.SIGTERM)
    ours = threading.current_thread() is threading.main_thread() and before is not None

    def take_back() -> None:
        if ours and callable(before):  # Ray's is better than none: it ends Ray's processes
            signal.signal(signal.SIGTERM, before)

    try:
        yield take_back
    finally:
        if ours:
            signal.signal(signal.SIGTERM, before)


def head_answers() -> bool:
    """Whether somebody listens where the head of the cluster was."""
    # A Ray client (ray://) has no such address, and talks to a server beside the head.
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
    """The nodes that are alive now."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
    return Cluster(
        embedded,
        node_cpus=tuple(int(node.get("CPU", 0)) for node in nodes),
        node_gpus=tuple(int(node.get("GPU", 0)) for node in nodes),
    )
