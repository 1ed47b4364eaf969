"""What the actors tell Ray's metrics, which Prometheus collects from every node."""

from __future__ import annotations

import threading

from ray.util.metrics import Counter, Gauge, Histogram

from latentmill.engine.worker import UnitResult

UNIT_SECONDS = [1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0, 3000.0, 10000.0]


class Metrics:
    """The metrics of one actor. Sums over actors and rates over time are Prometheus's part."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._told: dict[str, float] = {}
        self._items = Counter(
            "latentmill_items", "Items whose fate was committed.", tag_keys=("status",)
        )
        self._failures = Counter("latentmill_failures", "Items that failed.")
        self._units = Histogram(
            "latentmill_unit_seconds",
            "Time from a unit's first byte to its commit.",
            boundaries=UNIT_SECONDS,
        )
        self._counters = {
            "audio_seconds": Counter("latentmill_audio_seconds", "Audio that was encoded."),
            "wait_seconds": Counter(
                "latentmill_model_wait_seconds", "Time in which the model (the GPU) waited."
            ),
            "model_seconds": Counter(
                "latentmill_model_busy_seconds", "Time in which the model worked."
            ),
        }
        self._queued = Gauge("latentmill_queued_chunks", "Decoded chunks that wait for the model.")

    def unit(self, result: UnitResult) -> None:
        """A unit was committed."""
        for status in ("encoded", "skipped", "failed"):
            if count := getattr(result, status):
                self._items.inc(count, {"status": status})
        if result.failed:
            self._failures.inc(result.failed)
        self._units.observe(result.timings.get("total_seconds", 0.0))

    def update(self, meter: dict[str, float], queued: int) -> None:
        """How far the worker is."""
        with self._lock:
            for name, counter in self._counters.items():
                if (more := meter[name] - self._told.get(name, 0.0)) > 0:
                    counter.inc(more)
                    self._told[name] = meter[name]
            self._queued.set(queued)
