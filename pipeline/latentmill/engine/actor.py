"""The Ray actor around a worker. Ray places it on a share of a GPU, or on CPU cores."""

from __future__ import annotations

import logging
import os
import socket
import threading
from collections import deque
from dataclasses import dataclass
from functools import partial
from typing import Any

import ray

from latentmill.encoding.unit_audio import LocalAudio
from latentmill.engine.dispatch import UNITS_IN_FLIGHT
from latentmill.engine.joint import JointJob, JointWorker
from latentmill.engine.loss import memory_used
from latentmill.engine.metrics import ActorMetrics
from latentmill.engine.node_trouble import AvoidedNodes
from latentmill.engine.remote_audio import RemoteAudio
from latentmill.engine.worker import Job, OpenUnitAudio, Worker
from latentmill.engine.worker_slot import Report
from latentmill.models.inference.device import worker_environment
from latentmill.plan import Unit
from latentmill.text.log import ROOT

MAX_MESSAGES = 1000  # that wait for the driver


@dataclass(frozen=True)
class Reply:
    """Result of a call to an actor, and the log messages of its process since the last reply."""

    value: Any
    messages: tuple[tuple[str, int, str], ...]  # logger, level, text


class _Messages(logging.Handler):
    """Keeps log messages until they are taken."""

    def __init__(self, place: str) -> None:
        super().__init__()
        self._place = place
        self._waiting: deque[tuple[str, int, str]] = deque(maxlen=MAX_MESSAGES)

    def emit(self, record: logging.LogRecord) -> None:
        text = f"{self._place}: {record.getMessage()}"
        self._waiting.append((record.name, record.levelno, text))

    def take(self) -> tuple[tuple[str, int, str], ...]:
        return tuple(self._waiting.popleft() for _ in range(len(self._waiting)))


@ray.remote(max_restarts=0, max_task_retries=0)
class EncodeActor:
    """Keeps one model in memory, or those of a store and its fields. Encodes whole units,
    `UNITS_IN_FLIGHT` at a time.
    """

    def __init__(self, job: Job | JointJob) -> None:
        self._job = job
        self._place = f"process {os.getpid()} on {socket.gethostname()}"
        self._messages = _Messages(self._place)
        logging.getLogger(ROOT).addHandler(self._messages)
        logging.getLogger(ROOT).setLevel(job.log_level)
        self._stopped = threading.Event()
        self._worker: Worker | JointWorker | None = None
        self._metrics = ActorMetrics()

    def place(self) -> Reply:
        """The process and host, for messages. Answers while the model is loaded."""
        return Reply(self._place, ())

    def ready(self) -> Reply:
        """Load the model and return the process and host, for messages."""
        # Not in the constructor: only an error raised in a method reaches the driver unchanged.
        if isinstance(self._job, JointJob):
            self._worker = JointWorker(self._job, self._stopped)
        else:
            self._worker = Worker(self._job, self._stopped, audio_opener(self._job))
        return self._reply(self._place)

    def origin(self) -> Reply:
        return self._reply(self._loaded.origin())

    def encode(self, unit: Unit, trial_load: bool = False) -> Reply:
        result = self._loaded.encode(unit, trial_load)
        self._metrics.unit(result)
        return self._reply(result)

    def report(self) -> Reply:
        """Update Ray's metrics, and return the progress of the units in flight."""
        worker = self._loaded
        timings = worker.timings()
        self._metrics.update(timings, worker.queued)
        return self._reply(Report(int(timings["steps"]), worker.in_flight, memory_used()))

    def stop(self) -> None:
        """Cancel the units in flight; they remove their temporary files."""
        self._stopped.set()

    def _reply(self, value: Any) -> Reply:
        return Reply(value, self._messages.take())

    @property
    def _loaded(self) -> Worker | JointWorker:
        assert self._worker is not None, "`ready` is called first"
        return self._worker


def audio_opener(job: Job) -> OpenUnitAudio:
    """How a worker opens the audio of its units: with load tasks or with its own threads."""
    if not job.load_tasks:
        return LocalAudio
    return partial(
        RemoteAudio, tasks=job.load_tasks, hang_seconds=job.hang_seconds, avoided=AvoidedNodes()
    )


@dataclass(frozen=True)
class ActorShape:
    """What Ray reserves for one actor."""

    cpus: float
    gpus: float

    def __str__(self) -> str:
        gpus = f"{self.gpus:g} GPUs" if self.gpus else ""
        return gpus or f"{self.cpus:g} CPU cores"


def start_actor(job: Job | JointJob, shape: ActorShape) -> Any:
    """Start an actor. Returns its handle at once, before the model is loaded."""
    return EncodeActor.options(  # type: ignore[attr-defined]
        num_cpus=shape.cpus,
        num_gpus=shape.gpus,
        # The units, and one call for reports and stopping.
        max_concurrency=UNITS_IN_FLIGHT + 1,
        runtime_env={"env_vars": worker_environment()},
    ).remote(job)
