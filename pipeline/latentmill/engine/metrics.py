"""Ray metrics of the actors, which Prometheus collects from every node."""

from __future__ import annotations

import threading

from ray.util.metrics import Counter, Gauge, Histogram

from latentmill.engine.worker import UnitResult

UNIT_SECONDS = [1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0, 3000.0, 10000.0]


class ActorMetrics:
    """The metrics of one actor. Prometheus computes sums over actors and rates over time."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._reported: dict[str, float] = {}
        self._items = Counter(
            "latentmill_items", "Items in committed units, by status.", tag_keys=("status",)
        )
        self._failures = Counter("latentmill_failures", "Items that failed.")
        self._units = Histogram(
            "latentmill_unit_seconds",
            "Time from reading a unit's first byte to its commit.",
            boundaries=UNIT_SECONDS,
        )
        self._counters = {
            "audio_seconds": Counter("latentmill_audio_seconds", "Audio that was encoded."),
            "wait_seconds": Counter(
                "latentmill_model_wait_seconds", "Time in which the model waited for audio."
            ),
            "model_seconds": Counter(
                "latentmill_model_busy_seconds", "Time in which the model encoded."
            ),
        }
        self._queued = Gauge("latentmill_queued_chunks", "Loaded chunks that wait for the model.")

    def unit(self, result: UnitResult) -> None:
        """Count a committed unit and its items."""
        for status in ("encoded", "skipped", "failed"):
            if count := getattr(result, status):
                self._items.inc(count, {"status": status})
        if result.failed:
            self._failures.inc(result.failed)
        self._units.observe(result.timings.get("total_seconds", 0.0))

    def update(self, timings: dict[str, float], queued: int) -> None:
        """Add the growth of the worker's counters since the last call."""
        with self._lock:
            for name, counter in self._counters.items():
                if (more := timings[name] - self._reported.get(name, 0.0)) > 0:
                    counter.inc(more)
                    self._reported[name] = timings[name]
            self._queued.set(queued)
