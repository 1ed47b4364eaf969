"""Finds out why a worker was lost, and whether its units are suspects."""

from __future__ import annotations

from pathlib import Path

from ray.exceptions import (
    ActorDiedError,
    ActorUnavailableError,
    NodeDiedError,
    ObjectLostError,
    OutOfMemoryError,
    RayError,
    RayTaskError,
)

from latentmill.engine.dispatch import Loss

NEARLY_FULL = 0.9  # share of a host's memory above which a crash is reported as out of memory


def classify(error: BaseException, memory_used: float | None = None) -> Loss:
    """The loss that an error of `ray.get` stands for.

    `memory_used` is the share of the host's memory in the worker's last report.
    """
    if isinstance(error, RayTaskError):  # the worker is alive; its model or a library failed
        return Loss("worker", first_line(error.cause or error))
    text = " ".join(str(error).split())
    if isinstance(error, OutOfMemoryError) or "running low on memory" in text:
        return Loss("worker", "the host ran out of memory, and Ray's memory monitor killed it")
    if (node := _end_of_node(error, text)) is not None:
        return Loss("node", node)
    if isinstance(error, ActorDiedError) and "End of file" in text:
        cause = "it crashed, or was killed by SIGKILL"
        if memory_used is not None and memory_used > NEARLY_FULL:
            cause += f"; the host's memory was {memory_used:.0%} full, so out of memory is likely"
        return Loss("worker", f"its process died without an error message ({cause})")
    return Loss("worker", first_line(error))


def _end_of_node(error: BaseException, text: str) -> str | None:
    if getattr(error, "preempted", False):
        return "its node was preempted"
    if isinstance(error, NodeDiedError) or "node has died" in text or "node died" in text:
        return "its node died"
    if isinstance(error, ObjectLostError):
        return "the node that held its audio died"
    if isinstance(error, ActorUnavailableError):
        return "its node cannot be reached any more"
    return None


def first_line(error: BaseException) -> str:
    """The error in one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if isinstance(error, RayError):
        return lines[0] if lines else type(error).__name__
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def memory_used() -> float | None:
    """Share of this host's or container's memory that is in use, or None except on Linux."""
    shares = []
    try:
        entries = dict(
            line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines()
        )
        total, free = (int(entries[name].split()[0]) for name in ("MemTotal", "MemAvailable"))
        shares.append(1 - free / total)
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        if limit != "max":
            lines = Path("/sys/fs/cgroup/memory.stat").read_text().splitlines()
            reclaimable = int(dict(line.split() for line in lines)["inactive_file"])
            current = int(Path("/sys/fs/cgroup/memory.current").read_text())
            shares.append((current - reclaimable) / int(limit))
    except (OSError, KeyError, ValueError):
        pass
    return max(shares, default=None)
