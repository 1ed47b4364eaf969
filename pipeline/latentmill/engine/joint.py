"""Encodes units of a store and of its fields in one pass, in one process, without Ray.

Each model has a thread and a `Worker`; a unit's audio is loaded once for all of them. What they
write is what `encode` and then `add` write. The store commits a unit first, so a field knows which
items the store lacks. The `add` after the pass computes the units that a field still lacks.
"""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import torch

from latentmill.config import RunConfig
from latentmill.encoding.chunks import Chunking
from latentmill.encoding.unit_audio import LoadingStopped, SharedAudio, UnitAudio
from latentmill.engine.job import make_job
from latentmill.engine.lock import Hold
from latentmill.engine.underway import UnitProgress
from latentmill.engine.worker import Job, Link, Stopped, UnitResult, UnitWork, Worker, result_of
from latentmill.errors import LatentmillError
from latentmill.fields.inputs import Input, audio_inputs
from latentmill.fields.unit import OTHER_FILE
from latentmill.models.base import ModelHandle
from latentmill.plan import Plan, Unit
from latentmill.record import FloatArray, Outcome, absent_reason
from latentmill.store.commit import read_commit
from latentmill.store.schema import ORIGIN_PATH, Commit, commit_path
from latentmill.store.seal import write_origin
from latentmill.text.log import get_logger

_log = get_logger("engine")

WAIT_SECONDS = 0.5  # between two checks whether the worker was stopped


@dataclass(frozen=True)
class FieldInPass:
    """A field that is computed in the pass of its store.

    Attributes:
        config: Its settings; likewise its model, chunks and plan.
        hold: The run's exclusive access to the field.
        revisions: The revision to write, by the name of each unit that the field lacks.
    """

    config: RunConfig
    handle: ModelHandle
    chunking: Chunking
    plan: Plan
    hold: Hold
    revisions: Mapping[str, int]


@dataclass(frozen=True)
class JointUnit(Unit):
    """A unit of a store, with the revision to write in each field that is computed with it."""

    revisions: tuple[int | None, ...] = ()  # in the order of the job's fields


@dataclass(frozen=True)
class JointJob:
    """The jobs of a store and of its fields; small and picklable."""

    base: Job
    fields: tuple[Job, ...]

    @property
    def load_tasks(self) -> int:
        return self.base.load_tasks

    @property
    def log_level(self) -> int:
        return self.base.log_level


def joint_job(base: Job, fields: Sequence[FieldInPass]) -> JointJob:
    """The job of workers that compute a store and its fields in one pass."""
    jobs = []
    for one in fields:
        job = make_job(
            one.config,
            one.handle,
            one.chunking,
            one.plan,
            device=base.device,
            threads=base.threads,
        )
        jobs.append(replace(job, owner=one.hold.owner))
    return JointJob(base, tuple(jobs))


def joint_units(todo: Sequence[Unit], fields: Sequence[FieldInPass]) -> list[Unit]:
    """The units of a store with the revisions of those that its fields lack."""
    return [
        JointUnit(**vars(unit), revisions=tuple(one.revisions.get(unit.name) for one in fields))
        for unit in todo
    ]


def write_origins(hold: Hold, fields: Sequence[FieldInPass], origins: Sequence[FloatArray]) -> None:
    """Write the origins of a store and of its fields, unless they have been written before."""
    for one, origin in zip((hold, *(one.hold for one in fields)), origins, strict=True):
        if not one.storage.exists(ORIGIN_PATH):
            write_origin(one.storage, origin)


class JointWorker:
    """Encodes units with the models of a store and its fields. See `Worker`."""

    def __init__(self, job: JointJob, stopped: threading.Event | None = None) -> None:
        self._stopped = stopped or threading.Event()
        step = threading.Lock()
        self._base, *self._fields = [
            Worker(one, self._stopped, step=step) for one in (job.base, *job.fields)
        ]
        for worker in self._all:  # when all models are in the memory of the device
            worker.tune()
        self._turn = threading.Lock()  # units are encoded one after the other

    @property
    def _all(self) -> list[Worker]:
        return [self._base, *self._fields]

    def origin(self) -> list[FloatArray]:
        """The latents of one chunk of silence: of the store, then of the fields."""
        return [worker.origin() for worker in self._all]

    def timings(self) -> dict[str, float]:
        """The counters of the store's model so far. `steps` grows with the progress of any."""
        each = [worker.timings() for worker in self._all]
        return {**each[0], "steps": sum(timings["steps"] for timings in each)}

    @property
    def in_flight(self) -> dict[int, UnitProgress]:
        """Progress of the units in flight, by number: that of the model that is furthest behind."""
        slowest: dict[int, UnitProgress] = {}
        for worker in self._all:
            for number, now in worker.in_flight.items():
                known = slowest.get(number, now)
                slowest[number] = min(known, now, key=lambda one: one.audio_seconds)
        return slowest

    @property
    def queued(self) -> int:
        """Number of loaded chunks that wait for a model."""
        return sum(worker.queued for worker in self._all)

    def close(self) -> None:
        """Release the locks on the stores."""
        for worker in self._all:
            worker.close()

    def encode(self, unit: Unit, trial_load: bool = False) -> UnitResult:
        """Encode a unit in the store, and in the fields that lack it; commit the store first.

        If the store's model raises an exception, the whole attempt stops. If a field's model does,
        the others continue, and the `add` after the pass computes the unit of this field. If the
        exception made the device unusable, it is raised after the store's commit. Attempts with
        `trial_load` run only the store's model. If the unit is already committed, its result is
        returned, so a field's model that kills the process does not keep the unit from the store.
        """
        revisions = unit.revisions if isinstance(unit, JointUnit) else ()
        path = commit_path(unit.name, unit.revision)
        if self._base.storage.exists(path):  # by an attempt that ended in a field
            return result_of(unit, read_commit(self._base.storage, unit.name, unit.revision))
        taking = [
            (worker, replace(unit, revision=revision))
            for worker, revision in zip(self._fields, revisions, strict=True)
            if revision is not None
        ]
        if trial_load or not taking:
            return self._base.encode(unit, trial_load)
        works, workers = [self._base.begin(unit)], [self._base]
        for worker, one in taking:
            try:
                works.append(worker.begin(one, along=works[0]))
                workers.append(worker)
            except (LatentmillError, OSError) as error:
                _log_left(worker, one, error)
        audio = SharedAudio(
            works[0].items,
            [work.loading for work in works],
            [work.encoder.timings for work in works],
        )
        with contextlib.closing(audio), ThreadPoolExecutor(len(works), "model") as pool:
            return self._together(workers, works, audio, pool)

    def _together(
        self,
        workers: Sequence[Worker],
        works: Sequence[UnitWork],
        audio: SharedAudio,
        pool: ThreadPoolExecutor,
    ) -> UnitResult:
        shared = _UnitState(self._stopped, audio, len(works))
        links = [_OfBase(shared), *(_OfField(shared, number) for number in range(1, len(works)))]

        unusable: list[torch.AcceleratorError] = []  # errors after which the process must end

        def run(worker: Worker, work: UnitWork, share: UnitAudio, link: Link) -> UnitResult | None:
            try:
                return worker.finish(work, share, link)
            except BaseException as error:
                ends = not isinstance(error, Exception) or isinstance(
                    error, Stopped | LoadingStopped
                )
                if ends or not isinstance(link, _OfField):
                    shared.abort()
                    raise
                if isinstance(error, torch.AcceleratorError):
                    unusable.append(error)
                share.close()
                link.leave()
                _log_left(worker, work.unit, error)
                return None

        with self._turn:
            futures = [
                pool.submit(run, *one)
                for one in zip(workers, works, audio.shares(), links, strict=True)
            ]
            try:
                shared.wait(lambda: not shared.open)
            except Stopped:
                shared.abort()  # also wakes models that wait for audio
        errors = [error for one in futures if (error := one.exception()) is not None]
        causes = [one for one in errors if not isinstance(one, Stopped | LoadingStopped)]
        for error in causes:
            raise error
        result = futures[0].result() if not errors else None
        if result is None:
            raise Stopped
        if unusable:
            raise unusable[0]  # the store has the unit; another process goes on
        return result


def _log_left(worker: Worker, unit: Unit, error: BaseException) -> None:
    _log.warning(
        "unit %s of %s failed and is computed again when the store is complete: %s: %s",
        unit.name,
        worker.storage.root,
        type(error).__name__,
        str(error).partition("\n")[0],
    )


class _UnitState:
    """What the threads of a unit know of each other. Thread-safe."""

    def __init__(self, stopped: threading.Event, audio: SharedAudio, models: int) -> None:
        self._stopped, self._audio = stopped, audio
        self._changed = threading.Condition()  # guards what follows
        self._aborted = False
        self.open = set(range(models))  # numbers of models that have not encoded all items
        self.outcomes: dict[str, Outcome] = {}  # of the store, by key, without records
        self.kept_files: dict[str, str] = {}  # hashes of the files of records that the store keeps
        self.all_known = False  # whether the store has an outcome of every item
        self.commit: Commit | None = None  # of the store

    def wait(self, ready: Callable[[], bool]) -> None:
        """Wait until `ready`. Raises Stopped if a model has failed or the worker is stopped."""
        with self._changed:
            while not ready():
                if self._aborted or self._stopped.is_set():
                    raise Stopped
                self._changed.wait(WAIT_SECONDS)

    @contextlib.contextmanager
    def change(self) -> Iterator[None]:
        with self._changed:
            yield
            self._changed.notify_all()

    def abort(self) -> None:
        """Stop all models, because one has failed."""
        with self.change():
            self._aborted = True
        self._audio.stop()


class _OfBase(Link):
    """The unit in the store: it tells the fields which items the store lacks."""

    def __init__(self, shared: _UnitState) -> None:
        self._shared = shared

    def outcomes(self, outcomes: Iterator[Outcome]) -> Iterator[Outcome]:
        for outcome in outcomes:
            with self._shared.change():
                self._shared.outcomes[outcome.key] = replace(outcome, record=None)
                if outcome.record is not None and outcome.reason is not None:
                    self._shared.kept_files[outcome.key] = outcome.record.content_hash
            yield outcome
        with self._shared.change():
            self._shared.all_known = True
            self._shared.open.discard(0)

    def committed(self, commit: Commit) -> None:
        with self._shared.change():
            self._shared.commit = commit


class _OfField(Link):
    """The unit in a field: it skips what the store lacks, and is committed after the store."""

    def __init__(self, shared: _UnitState, number: int) -> None:
        self._shared, self._number = shared, number

    def leave(self) -> None:
        """The model has encoded all items, or has failed: nobody waits for it."""
        with self._shared.change():
            self._shared.open.discard(self._number)

    def outcomes(self, outcomes: Iterator[Outcome]) -> Iterator[Outcome]:
        """The model does not wait for the store: its outcomes do, at most those of the unit."""
        known = self._shared.outcomes
        waiting: deque[Outcome] = deque()
        for outcome in outcomes:
            waiting.append(outcome)
            while waiting and waiting[0].key in known:
                yield self._settled(waiting.popleft())
        self.leave()
        self._shared.wait(lambda: self._shared.all_known)
        yield from map(self._settled, waiting)

    def _settled(self, outcome: Outcome) -> Outcome:
        base = self._shared.outcomes[outcome.key]
        if base.status == "encoded":
            kept, record = self._shared.kept_files.get(outcome.key), outcome.record
            if kept is None or record is None or record.content_hash == kept:
                return outcome
            return Outcome(outcome.key, "failed", OTHER_FILE)
        return Outcome(outcome.key, "skipped", absent_reason(base.status, base.reason))

    def inputs(self, work: UnitWork) -> Mapping[str, Input]:
        self._shared.wait(lambda: self._shared.commit is not None)
        return audio_inputs(work.planned, self._shared.commit)
