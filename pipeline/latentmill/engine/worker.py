"""What a worker does with a unit, without Ray: encode it, write its shard, commit it.

A worker is called by two threads at once: while the model works on one unit, the other thread
writes the previous unit's shard and then starts to decode the next one. Units take turns at the
model whole, so that the one in front is finished first. A unit that has killed workers before is
encoded carefully: what its items do to a decoder is tried out in another process.
"""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from latentmill.encoding.chunks import Chunking
from latentmill.encoding.encoder import UnitEncoder
from latentmill.encoding.timings import Meter
from latentmill.encoding.unit_audio import Decoding, EncodeSettings, Heard, LocalAudio, UnitAudio
from latentmill.engine.careful import HANG_SECONDS, Trials
from latentmill.engine.lock import join_run
from latentmill.engine.underway import Underway, UnitProgress
from latentmill.errors import StoreError
from latentmill.facts import parse_json
from latentmill.models.base import Autoencoder, ModelHandle
from latentmill.models.checks import check_encoded
from latentmill.models.inference.batch import find_batch_size
from latentmill.models.inference.compiled import Compiled
from latentmill.models.inference.device import pick_device
from latentmill.models.inference.precision import numeric_mode, pick_precision
from latentmill.plan import Unit, read_items
from latentmill.record import Outcome
from latentmill.sources.base import Item
from latentmill.storage.storage import Storage
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
    compile: bool = False
    decode_tasks: int = 0  # a unit is decoded by so many tasks elsewhere; 0: by threads of its own
    auto_batch: bool = False  # on a GPU the batch size of the settings is only where to begin
    owner: str | None = None  # of the run's lease on the store, if it has one
    hang_seconds: float = HANG_SECONDS  # a decoder on trial may be silent for so long


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
BATCH_PATH = "plan/batch.json"


Listen = Callable[[Sequence[Item], Decoding, Meter], UnitAudio]


class Stopped(Exception):  # noqa: N818  nothing is wrong
    """The worker was told to stop in the middle of a unit."""


class Worker:
    """One model in memory, fed with units. `encode` may be called by two threads.

    Args:
        job: What there is to know.
        stopped: Once it is set, units end with `Stopped` at their next piece of audio.
        listen: Begins to decode a unit's items.
    """

    def __init__(
        self, job: Job, stopped: threading.Event | None = None, listen: Listen = LocalAudio
    ) -> None:
        device = pick_device(job.device)  # asked of the machine where the model will be
        pick_precision(job.settings.precision, device)
        if device == "cpu":
            torch.set_num_threads(job.threads)
        self._job = job
        self._device = device
        self._stopped = stopped or threading.Event()
        self._listen = listen
        self._hold = join_run(Storage(job.store), job.owner)
        self._storage = self._hold.storage
        self._model: Autoencoder = job.model.load(device)
        if job.auto_batch and device != "cpu":
            size = settled_batch_size(self._storage, self._model, job, device)
            self._job = replace(job, settings=replace(job.settings, batch_size=size))
        if job.compile:
            self._model = compiled(self._model, self._job, device)
        self._meter = Meter()
        self._turn = threading.Lock()
        self._streams: list[UnitAudio] = []  # of the units in flight
        self._underway: dict[int, Underway] = {}  # how far they are, by number
        self._free_since: float | None = None  # since when no unit has the model, but some are here

    def origin(self) -> npt.NDArray[np.float32]:
        """The latent of one chunk of silence, `[D, Z]`."""
        spec = self._model.spec
        samples = self._job.chunking.model_samples(spec)
        silence = torch.zeros(1, spec.channels, samples)  # [B, C, T]
        with self._turn, numeric_mode(self._job.settings.precision, self._device):
            latents = self._model.encode(silence)
        check_encoded(spec, samples, latents.shape)
        origin: npt.NDArray[np.float32] = latents[0].float().cpu().numpy()
        return origin

    def meter(self) -> dict[str, float]:
        """The counters so far; `steps` grows as long as anything goes on."""
        return {**self._meter.snapshot(), "steps": self._meter.steps}

    @property
    def in_flight(self) -> dict[int, UnitProgress]:
        """How far each unit in flight is, by number."""
        return {number: unit.progress for number, unit in self._underway.copy().items()}

    @property
    def queued(self) -> int:
        """Decoded chunks that wait for the model."""
        return sum(stream.queued for stream in tuple(self._streams))

    def close(self) -> None:
        """Let go of the store; the end of the process does so, too."""
        self._hold.close()

    def encode(self, unit: Unit, careful: bool = False) -> UnitResult:
        """Read a unit's items from the plan, encode them, write their shard and commit it.

        Args:
            unit: The unit.
            careful: Decode each item on trial first; those that would end this process fail.

        Raises:
            StoreError: The plan is damaged, or the store is another run's now.
            StorageError: The store cannot be written; nothing of the unit stays.
            Stopped: The worker was told to stop; nothing of the unit stays.
        """
        began = time.perf_counter()
        job, meter = self._job, Meter(parent=self._meter)
        items = read_items(self._storage, unit)
        refused = self._refused(items, meter) if careful else {}
        encoder = UnitEncoder(self._model, job.chunking, job.settings, meter, self._device)
        decoding = Decoding(self._model.spec, job.chunking, job.settings, refused)
        audio = self._listen(items, decoding, meter)
        underway = Underway(unit, items, self._model.spec)
        followed = underway.follow(audio)
        with (
            self._listed(audio, unit, underway),
            contextlib.closing(self._in_turn(encoder, followed)) as done,
        ):
            commit = write_unit(
                self._storage,
                unit.name,
                done,
                format_name=job.format,
                fingerprint=job.fingerprint,
                info=job.info,
                revision=unit.revision,
            )
        meter.add("write_seconds", time.perf_counter() - encoder.ended)
        timings = {**meter.snapshot(), "total_seconds": time.perf_counter() - began}
        commit = commit.model_copy(update={"items_hash": unit.hash})
        return _result(unit, write_commit(self._storage, commit, timings))

    def _refused(self, items: Sequence[Item], meter: Meter) -> dict[str, str]:
        """What speaks against items, by key: their decoding ends or hangs a process."""
        spec, settings = self._model.spec, self._job.settings
        refused = {}
        with Trials(
            spec.sample_rate,
            spec.channels,
            allow_truncated=settings.allow_truncated,
            hang_seconds=self._job.hang_seconds,
        ) as trials:
            for item in items:
                if self._stopped.is_set():
                    raise Stopped
                if reason := trials.reason_against(item):
                    refused[item.key] = reason
                meter.add("decode_seconds", 0.0)  # a sign of life
        return refused

    @contextlib.contextmanager
    def _listed(self, audio: UnitAudio, unit: Unit, underway: Underway) -> Iterator[None]:
        self._streams.append(audio)
        self._underway[unit.number] = underway
        try:
            with contextlib.closing(audio):
                yield
        finally:
            self._streams.remove(audio)
            del self._underway[unit.number]
            if not self._streams:
                self._free_since = None

    def _in_turn(self, encoder: UnitEncoder, audio: Iterable[Heard]) -> Generator[Outcome]:
        with self._turn:
            if self._free_since is not None:
                encoder.meter.add("idle_seconds", time.perf_counter() - self._free_since)
                self._free_since = None
            yield from encoder.encode(self._until_stopped(audio))
            self._free_since = encoder.ended if len(self._streams) > 1 else None

    def _until_stopped(self, audio: Iterable[Heard]) -> Iterator[Heard]:
        for heard in audio:
            if self._stopped.is_set():
                raise Stopped
            yield heard


def compiled(model: Autoencoder, job: Job, device: str) -> Compiled:
    """A model, compiled for a job's full batches of full chunks."""
    spec, settings = model.spec, job.settings
    shape = (settings.batch_size, spec.channels, job.chunking.model_samples(spec))  # [B, C, T]
    return Compiled(model, shape, device, settings.precision)


def settled_batch_size(storage: Storage, model: Autoencoder, job: Job, device: str) -> int:
    """The batch size of a store on GPUs, found by the first worker that asks for it.

    It changes the latents in their last digits: every worker, and a run that resumes, takes what
    is written in the store.

    Raises:
        ModelError: Not even one chunk fits into the GPU's memory.
        StoreError: What is written is damaged.
    """
    if not storage.exists(BATCH_PATH):
        samples = job.chunking.model_samples(model.spec)
        size = find_batch_size(model, samples, device, job.settings.precision)
        storage.create(BATCH_PATH, json.dumps({"batch_size": size}).encode())
    try:
        settled = parse_json(storage.read(BATCH_PATH))["batch_size"]
        if not isinstance(settled, int) or settled < 1:
            raise ValueError(settled)
    except (ValueError, TypeError, KeyError) as error:
        raise StoreError(
            f"Store {storage.root}: {BATCH_PATH} is damaged; write the batch size of the run into "
            'it, such as {"batch_size": 16}, or delete it.'
        ) from error
    return settled


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
