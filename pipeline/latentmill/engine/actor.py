"""The actor: a worker that Ray places on a share of a GPU, or on CPU cores."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import ray

from latentmill.device import KEEP_FREED_MEMORY
from latentmill.engine.worker import Job, UnitResult, Worker
from latentmill.plan import Unit

UNITS_IN_FLIGHT = 2


@ray.remote(max_restarts=0, max_task_retries=0)
class EncodeActor:
    """Pins one model and takes whole units, `UNITS_IN_FLIGHT` at a time; see `Worker`."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._stopped = threading.Event()
        self._worker: Worker | None = None
        self._loading = threading.Lock()

    def origin(self) -> npt.NDArray[np.float32]:
        """See `Worker.origin`."""
        return self._loaded().origin()

    def encode(self, unit: Unit) -> UnitResult:
        """See `Worker.encode`."""
        return self._loaded().encode(unit)

    def meter(self) -> dict[str, float]:
        """See `Worker.meter`; empty while the model is being loaded."""
        return self._worker.meter() if self._worker else {}

    def stop(self) -> None:
        """Let the units in flight end soon, without a trace."""
        self._stopped.set()

    def _loaded(self) -> Worker:
        # Not in the constructor: Ray passes on an error of ours from a method only.
        with self._loading:
            if self._worker is None:
                self._worker = Worker(self._job, self._stopped)
        return self._worker


@dataclass(frozen=True)
class ActorShape:
    """What Ray reserves for one actor."""

    cpus: float
    gpus: float


def start_actor(job: Job, shape: ActorShape) -> Any:
    """Start an actor; gives its handle at once, while the model is still being loaded."""
    environment = {} if shape.gpus else KEEP_FREED_MEMORY
    return EncodeActor.options(  # type: ignore[attr-defined]
        num_cpus=shape.cpus,
        num_gpus=shape.gpus,
        # The units, and what the driver asks or says meanwhile.
        max_concurrency=UNITS_IN_FLIGHT + 1,
        runtime_env={"env_vars": environment},
    ).remote(job)
