"""Measures the cost of scheduling: 10,000 units, a hundred simulated GPUs and one real driver.

    python benchmarks/driver.py [--units 10000] [--seconds 2] [--gpus 100]

A simulated GPU sleeps `--seconds` for each unit. Everything between the driver and the GPUs is
real: Ray, the calls, the results, the scheduler. `overhead_of_run` is the run's time divided by
that of GPUs that never wait, minus one. `driver_cpu_share` is the share of a core that the
scheduler's thread uses. `driver_growth_mib` is the growth of the driver's memory from the first
unit to the last.
"""

from __future__ import annotations

import argparse
import asyncio
import time
from collections import Counter
from pathlib import Path
from typing import Any
from unittest import mock

from common import write_result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--units", type=int, default=10_000)
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--gpus", type=int, default=100)
    parser.add_argument("--results", type=Path, default=None)
    arguments = parser.parse_args()
    result = measure(arguments.units, arguments.seconds, arguments.gpus)
    result = {"script": "benchmarks/driver.py", **result}
    write_result("driver", result, *([arguments.results] if arguments.results else []))


class Gpus:
    """A Ray actor with many simulated GPUs in one process."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._turns: dict[int, asyncio.Lock] = {}
        self._done: Counter[int] = Counter()

    async def place(self, gpu: int) -> Any:
        return reply(f"GPU {gpu}")

    async def ready(self, gpu: int) -> Any:
        self._turns[gpu] = asyncio.Lock()
        return reply(f"GPU {gpu}")

    async def origin(self, gpu: int) -> Any:
        import numpy as np

        return reply(np.zeros((64, 8), np.float32))

    async def encode(self, gpu: int, unit: Any, trial_load: bool) -> Any:
        from latentmill.engine.worker import UnitResult

        async with self._turns[gpu]:
            await asyncio.sleep(self._seconds)
        self._done[gpu] += 1
        timings = {"model_seconds": self._seconds, "wait_seconds": 0.0}
        return reply(UnitResult(unit.number, unit.items, 0, 0, unit.seconds, (), timings))

    async def report(self, gpu: int) -> Any:
        from latentmill.engine.worker_slot import Report

        return reply(Report(self._done[gpu], {}, None))

    async def stop(self, gpu: int) -> None:
        """Does nothing: there is nothing to release."""


def reply(value: Any) -> Any:
    from latentmill.engine.actor import Reply

    return Reply(value, ())


class Handle:
    """Stands in for the handle of an actor."""

    def __init__(self, gpus: Any, number: int) -> None:
        self._gpus, self._number = gpus, number

    def __getattr__(self, method: str) -> Any:
        call = getattr(self._gpus, method)

        class Method:
            remote = staticmethod(lambda *arguments: call.remote(self._number, *arguments))

        return Method


def measure(units: int, seconds: float, gpus: int) -> dict[str, Any]:
    import ray

    from latentmill.engine import scheduler as module
    from latentmill.engine.actor import ActorShape
    from latentmill.engine.progress import LogProgress
    from latentmill.engine.tracker import Tracker
    from latentmill.plan import Plan, Unit

    ray.init("local", include_dashboard=False, logging_level="ERROR", log_to_driver=False)
    simulated = ray.remote(num_cpus=0, max_concurrency=4 * gpus)(Gpus).remote(seconds)
    handles = (Handle(simulated, number) for number in range(10**9))
    plan = Plan("", {}, "", {}, "parquet", {}, units=tuple(Unit(n, 50, 1e4) for n in range(units)))
    marks: dict[str, tuple[float, float, float]] = {}

    class Marks(LogProgress):
        done = 0

        def unit_done(self, result: Any) -> None:
            super().unit_done(result)
            self.done += 1
            if self.done == gpus:  # all of them are working
                mark("begin")
            if self.done == units:
                mark("end")

    def mark(name: str) -> None:
        marks[name] = time.perf_counter(), time.thread_time(), memory()

    with (
        mock.patch.object(module, "start_actor", lambda job, shape: next(handles)),
        mock.patch.object(module.ray, "kill", lambda actor: None),
    ):
        tracker = Tracker(plan, {}, Marks())
        scheduler = module.Scheduler(None, ActorShape(0, 0), lambda: gpus, tracker)
        scheduler.run(plan.units, lambda origin: None)
    (began, cpu_began, before), (ended, cpu_ended, after) = marks["begin"], marks["end"]
    counted = units - gpus
    ideal = counted * seconds / gpus
    return {
        "units": units,
        "simulated_gpus": gpus,
        "seconds_per_unit": seconds,
        "run_seconds": round(ended - began, 2),
        "ideal_seconds": round(ideal, 2),
        "overhead_of_run": round((ended - began) / ideal - 1, 4),
        "driver_cpu_ms_per_unit": round(1000 * (cpu_ended - cpu_began) / counted, 3),
        "driver_cpu_share": round((cpu_ended - cpu_began) / (ended - began), 4),
        "driver_growth_mib": round(after - before, 1),
    }


def memory() -> float:
    """Memory of this process in MiB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / 2**20


if __name__ == "__main__":
    main()
