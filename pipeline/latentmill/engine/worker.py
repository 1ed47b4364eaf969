"""What a worker does with a unit, without Ray: encode it, write its shard, commit it.

A worker is called by two threads at once: while the model works on one unit, the other thread
writes the previous unit's shard and then starts to decode the next one. Units take turns at the
model whole, so that the one in front is finished first.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from latentmill.chunks import Chunking
from latentmill.device import pick_device
from latentmill.encode import AudioStream, EncodeSettings, Meter, UnitEncoder
from latentmill.engine.lock import join_run
from latentmill.models.base import ModelHandle
from latentmill.models.precision import numeric_mode, pick_precision
from latentmill.plan import Unit
from latentmill.record import Outcome
from latentmill.sources.base import Item
from latentmill.storage import Storage
from latentmill.store.commit import write_commit, write_unit
from latentmill.store.schema import Commit


@dataclass(frozen=True)
class Job:
    """Everything that a worker needs to know; small and picklable."""

    model: ModelHandle
    chunking: Chunking
    settings: EncodeSettings
    store: str
    format: str
    fingerprint: str
    info: dict[str, Any]
    device: str
    threads: int


@dataclass(frozen=True)
class UnitResult:
    """What the driver learns of a unit: counters, no payload."""

    unit: int
    encoded: int
    skipped: int
    failed: int
    audio_seconds: float
    failures: tuple[tuple[str, str], ...]  # (key, reason) of the first few
    timings: dict[str, float]


MAX_REPORTED_FAILURES = 20


class Stopped(Exception):  # noqa: N818  nothing is wrong
    """The worker was told to stop in the middle of a unit."""


class Worker:
    """One model in memory, fed with units. `encode` may be called by two threads.

    Once `stopped` is set, units end with `Stopped` at their next piece of audio.
    """

    def __init__(self, job: Job, stopped: threading.Event | None = None) -> None:
        device = pick_device(job.device)  # asked of the machine where the model will be
        pick_precision(job.settings.precision, device)
        if device == "cpu":
            torch.set_num_threads(job.threads)
        self._job = job
        self._device = device
        self._stopped = stopped or threading.Event()
        self._storage = Storage(job.store)
        self._lock = join_run(self._storage)
        self._model = job.model.load(device)
        self._meter = Meter()
        self._turn = threading.Lock()

    def origin(self) -> npt.NDArray[np.float32]:
        """The latent of one chunk of silence, `[D, Z]`."""
        spec = self._model.spec
        samples = self._job.chunking.model_samples(spec)
        silence = torch.zeros(1, spec.channels, samples)  # [B, C, T]
        with self._turn, numeric_mode(self._job.settings.precision, self._device):
            origin: npt.NDArray[np.float32] = self._model.encode(silence)[0].float().cpu().numpy()
        return origin

    def meter(self) -> dict[str, float]:
        """The counters so far."""
        return self._meter.snapshot()

    def close(self) -> None:
        """Let go of the store; the end of the process does so, too."""
        if self._lock is not None:
            self._lock.close()

    def encode(self, unit: Unit) -> UnitResult:
        """Encode a unit, write its shard and commit it.

        Raises:
            StorageError: The store cannot be written; nothing of the unit stays.
            Stopped: The worker was told to stop; nothing of the unit stays.
        """
        began = time.perf_counter()
        job = self._job
        meter = Meter(parent=self._meter)
        encoder = UnitEncoder(self._model, job.chunking, job.settings, meter, self._device)
        audio = _StoppableStream(
            unit.items, self._model.spec, job.chunking, job.settings, meter, stopped=self._stopped
        )
        with contextlib.closing(audio), contextlib.closing(self._in_turn(encoder, audio)) as done:
            commit = write_unit(
                self._storage,
                unit.name,
                done,
                format_name=job.format,
                fingerprint=job.fingerprint,
                info=job.info,
            )
        timings = {**meter.snapshot(), "total_seconds": time.perf_counter() - began}
        return _result(unit, write_commit(self._storage, commit, timings))

    def _in_turn(self, encoder: UnitEncoder, audio: AudioStream) -> Generator[Outcome]:
        with self._turn:
            yield from encoder.encode(audio)


class _StoppableStream(AudioStream):
    """A unit's audio that ends with `Stopped` when the worker is told to stop."""

    def __init__(self, *args: Any, stopped: threading.Event) -> None:
        super().__init__(*args)
        self._worker_stopped = stopped

    def __iter__(self) -> Iterator[tuple[int, Item, Any]]:
        for event in super().__iter__():
            if self._worker_stopped.is_set():
                raise Stopped
            yield event


def _result(unit: Unit, commit: Commit) -> UnitResult:
    failures = [(item.key, item.reason or "") for item in commit.items if item.status == "failed"]
    return UnitResult(
        unit=unit.number,
        encoded=commit.count("encoded"),
        skipped=commit.count("skipped"),
        failed=len(failures),
        audio_seconds=commit.audio_seconds,
        failures=tuple(failures[:MAX_REPORTED_FAILURES]),
        timings=commit.timings,
    )
