"""Nodes on which load tasks cannot work, for example because the disk is full."""

from __future__ import annotations

import threading
import time
from collections.abc import Collection
from dataclasses import dataclass

import ray

AVOID_SECONDS = 600.0  # before tasks are started on a node with trouble again


@dataclass(frozen=True)
class NodeTrouble:
    """Why a task cannot go on. Its node is the cause, not an item.

    Attributes:
        node: Ray's id of the node.
        host: Its host name.
        reason: What is wrong and what to do, without a full stop.
    """

    node: str
    host: str
    reason: str


class AvoidedNodes:
    """Nodes that have had trouble in the last `AVOID_SECONDS`. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._found: dict[str, tuple[str, float]] = {}  # host and time by Ray's id

    def add(self, trouble: NodeTrouble) -> None:
        with self._lock:
            self._found[trouble.node] = trouble.host, time.monotonic()

    def current(self) -> dict[str, str]:
        """Their hosts by Ray's id; none if no other node has CPU cores."""
        oldest = time.monotonic() - AVOID_SECONDS
        with self._lock:
            found = {node: host for node, (host, at) in self._found.items() if at > oldest}
        return found if found and other_nodes(found) else {}


def other_nodes(avoided: Collection[str]) -> list[str]:
    """Ray's ids of the nodes that have CPU cores, without those in `avoided`."""
    return [
        node["NodeID"]
        for node in ray.nodes()  # type: ignore[no-untyped-call]
        if node["Alive"] and node["Resources"].get("CPU", 0) >= 1 and node["NodeID"] not in avoided
    ]


def label_selector(avoided: Collection[str]) -> dict[str, str]:
    """The option of a Ray task that keeps it off these nodes."""
    return {"ray.io/node-id": f"!in({','.join(sorted(avoided))})"}
