"""A Ray cluster of several real nodes on this machine, whose parts can be killed and cut off."""

from __future__ import annotations

import contextlib
import os
import signal
from pathlib import Path
from typing import Any

from support import runs

OBJECT_STORE_BYTES = 100 * 2**20
# A head that is gone is given up after this, and a node that does not answer.
RAY_SYSTEM = {
    "health_check_initial_delay_ms": 1000,
    "health_check_period_ms": 1000,
    "health_check_timeout_ms": 2000,
    "health_check_failure_threshold": 3,
}


class Nodes:
    """A head without cores and worker nodes with one core each."""

    def __init__(self) -> None:
        from ray.cluster_utils import Cluster
        from ray.experimental import internal_kv

        # A new head makes itself this process's, whose own Ray would then be lost with it.
        self._own_head = internal_kv.internal_kv_get_gcs_client()
        paths = [runs.TESTS, runs.TESTS.parent / "pipeline"]
        self._environment = {"PYTHONPATH": os.pathsep.join(map(str, paths))}
        self._old = {name: os.environ.get(name) for name in self._environment}
        os.environ |= self._environment
        self._make = Cluster
        self.workers: list[Any] = []
        self.start_head()

    @property
    def address(self) -> str:
        return str(self._cluster.address)

    def start_head(self) -> None:
        self._cluster = self._make(
            initialize_head=True,
            shutdown_at_exit=False,
            head_node_args={
                "num_cpus": 0,
                "include_dashboard": False,
                "object_store_memory": OBJECT_STORE_BYTES,
                "_system_config": RAY_SYSTEM,
            },
        )
        self.workers = []

    def add(self, **environment: str) -> Any:
        """Add a node whose processes have these environment variables, too."""
        node = self._cluster.add_node(
            num_cpus=1, object_store_memory=OBJECT_STORE_BYTES, env_vars=environment
        )
        self.workers.append(node)
        return node

    def kill_node(self, node: Any) -> None:
        """As when its machine loses power."""
        self.workers.remove(node)
        node.kill_all_processes(check_alive=False, allow_graceful=False, wait=True)
        self._cluster.worker_nodes.discard(node)

    def kill_head(self) -> None:
        """The head and, as their raylets end without it, all nodes."""
        self._cluster.head_node.kill_all_processes(
            check_alive=False, allow_graceful=False, wait=True
        )
        for node in list(self.workers):
            self.kill_node(node)

    def actors(self, node: Any) -> list[int]:
        """The processes of a node's actors."""
        processes = self._processes(node).items()
        return [pid for pid, name in processes if name.startswith("ray::Encode")]

    def cut_off(self, node: Any) -> list[int]:
        """Stop all of a node's processes, as if its network were gone; gives what to bring back."""
        stopped = list(self._processes(node))
        self._signal(stopped, signal.SIGSTOP)
        return stopped

    def bring_back(self, stopped: list[int]) -> None:
        self._signal(stopped, signal.SIGCONT)

    def forget(self, node: Any) -> None:
        """A node that was declared dead ends itself when it is back; make sure that it did."""
        if node in self.workers:
            self.kill_node(node)

    def shutdown(self) -> None:
        from ray.experimental import internal_kv

        for node in list(self.workers):
            self.kill_node(node)
        self._cluster.head_node.kill_all_processes(check_alive=False, allow_graceful=False)
        if self._own_head is not None:
            internal_kv._initialize_internal_kv(self._own_head)
        for name, value in self._old.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value

    def _processes(self, node: Any) -> dict[int, str]:
        roots = [info.process.pid for infos in node.all_processes.values() for info in infos]
        found = dict.fromkeys(roots, "")
        for root in roots:
            found |= runs.descendants(root)
        return found

    def _signal(self, processes: list[int], signum: int) -> None:
        for pid in processes:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signum)


def environment() -> dict[str, str]:
    """What a driver needs to be let in: a Ray that this process has started asks for a token."""
    return {name: value for name, value in os.environ.items() if name.startswith("RAY_AUTH")}


def arguments(songs: Path, store: Path, address: str, seconds: float) -> list[str]:
    """A run whose model sleeps, on a cluster."""
    return [
        *("encode", str(songs), str(store), "--model", runs.SLOW_MODEL, "--device", "cpu"),
        *("--model-option", f"seconds={seconds}", "--batch-size", "1", "--threads", "1"),
        *("--unit-seconds", "4", "--address", address, "--json"),
    ]
