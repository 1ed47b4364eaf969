"""Encodes units in one process, without Ray: load the audio, encode it, write and commit the shard.

Two threads call a worker at once. While the model encodes one unit, the other thread writes the
previous unit's shard and then starts to load the next unit. A unit has the model until it is
encoded, so that the first unit is finished first. If a unit has killed workers before, its items
are first loaded on trial in another process.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import threading
import time
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from latentmill.encoding.chunks import Chunking
from latentmill.encoding.encoder import UnitEncoder
from latentmill.encoding.lanes import reading_order
from latentmill.encoding.loading import EncodeSettings, Facts, ItemEvent, Loading
from latentmill.encoding.timings import Timings
from latentmill.encoding.unit_audio import LocalAudio, UnitAudio
from latentmill.engine.handover import written_beside
from latentmill.engine.lock import Membership
from latentmill.engine.trial_load import HANG_SECONDS, TrialLoader
from latentmill.engine.tuning import compiled, settled_batch_size
from latentmill.engine.underway import Underway, UnitProgress
from latentmill.fields.inputs import Input, audio_inputs, with_audio_inputs
from latentmill.fields.unit import OTHER_FILE, BaseCommits, FieldUnit
from latentmill.models.base import Autoencoder, ModelHandle
from latentmill.models.checks import check_encoded
from latentmill.models.inference.device import load_model, pick_device
from latentmill.models.inference.device_pipeline import ALONE
from latentmill.models.inference.precision import numeric_mode, pick_precision
from latentmill.plan import Unit, read_items
from latentmill.plan.items import estimated_seconds
from latentmill.plan.presence import checked
from latentmill.plan.probe import cheap, probed
from latentmill.record import FloatArray, Outcome
from latentmill.sources.base import Item, known_seconds
from latentmill.storage.storage import Storage
from latentmill.store.commit import write_commit, write_unit
from latentmill.store.earlier import EarlierRecords
from latentmill.store.schema import Commit


@dataclass(frozen=True)
class Job:
    """Settings of a worker; small and picklable."""

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
    load_tasks: int = 0  # number of Ray tasks that load a unit; 0: the worker's threads load it
    auto_batch: bool = False  # on a GPU, measure the best batch size
    owner: str | None = None  # id in the run's lease on the store, if it has one
    base: str | None = None  # of a field: its base store
    base_chunk_seconds: float | None = None  # of a field: the length of chunks of its base
    retry_failed: bool = False  # of a field: compute failed items again
    hang_seconds: float = HANG_SECONDS  # a trial load without progress for this long is hung
    log_level: int = logging.WARNING  # of the messages that the driver gets


@dataclass(frozen=True)
class UnitResult:
    """Result of a unit for the driver: counters, no latents."""

    unit: int
    encoded: int
    skipped: int
    failed: int
    audio_seconds: float
    failures: tuple[tuple[str, str], ...]  # (key, reason) of the first few
    timings: dict[str, float]


MAX_REPORTED_FAILURES = 20
PROBED_CHUNKS = 4  # headers of items that are estimated to be longer are not read


OpenUnitAudio = Callable[[Sequence[Item], Loading, Timings], UnitAudio]


class Stopped(Exception):  # noqa: N818  nothing is wrong
    """The worker was stopped during a unit."""


@dataclass(frozen=True)
class UnitWork:
    """A unit that a worker has begun.

    Attributes:
        unit: The unit.
        planned: Its items, in the order of the plan.
        items: Those that are read, in this order.
        field: What is done with each item, if the store is a field.
        earlier: The records that the store has so far.
        loading: How they are loaded.
        encoder: Encodes them.
        began: When the worker began, by `perf_counter`.
    """

    unit: Unit
    planned: Sequence[Item]
    items: Sequence[Item]
    field: FieldUnit | None
    earlier: EarlierRecords
    loading: Loading
    encoder: UnitEncoder
    began: float


class Link:
    """How a unit depends on the same unit of another store; this one depends on none."""

    def outcomes(self, outcomes: Iterator[Outcome]) -> Iterator[Outcome]:
        """The outcomes that are written, of those that the model gives."""
        return outcomes

    def inputs(self, work: UnitWork) -> Mapping[str, Input] | None:
        """The inputs in a field's commit. Called when the shard is written."""
        return None if work.field is None else work.field.inputs

    def committed(self, commit: Commit) -> None:
        """Called when the unit is committed."""


ALONE_IN_UNIT = Link()


class Worker:
    """Encodes units with one model. `encode` may be called by two threads.

    After `stopped` is set, units end with `Stopped` at their next chunk. `open_audio_of` starts to
    load a unit's items. `step` is held while the model encodes; models that run in several threads
    share it, and are tuned when all of them are loaded.

    Attributes:
        storage: The store. It refuses writes after another run has taken over.
    """

    def __init__(
        self,
        job: Job,
        stopped: threading.Event | None = None,
        open_audio_of: OpenUnitAudio = LocalAudio,
        step: AbstractContextManager[object] | None = None,
    ) -> None:
        device = pick_device(job.device)  # on the machine that will run the model
        pick_precision(job.settings.precision, device)
        if device == "cpu":
            torch.set_num_threads(job.threads)
        self._job = job
        self._device = device
        self._stopped = stopped or threading.Event()
        self._open_audio_of = open_audio_of
        self._base = None if job.base is None else BaseCommits(job.base)
        self._hold = Membership(Storage(job.store), job.owner)
        self.storage = self._hold.storage
        self._model: Autoencoder = load_model(job.model, device)
        self._step = step or ALONE
        if step is None:
            self.tune()
        self._timings = Timings()
        self._turn = threading.Lock()
        self._streams: list[UnitAudio] = []  # of the units in flight
        self._underway: dict[int, Underway] = {}  # their progress, by number
        self._free_since: float | None = None  # when the model became idle with units in flight

    def tune(self) -> None:
        """Find the batch size on a GPU, and compile the model, if the job says so."""
        job, device = self._job, self._device
        if job.auto_batch and device != "cpu":
            size = settled_batch_size(self.storage, self._model, job, device)
            self._job = replace(job, settings=replace(job.settings, batch_size=size))
        if job.compile:
            self._model = compiled(self._model, self._job, device)

    def origin(self) -> FloatArray:
        """The latent of one chunk of silence, `[D, Z]`."""
        spec = self._model.spec
        samples = self._job.chunking.model_samples(spec)
        silence = torch.zeros(1, spec.channels, samples)  # [B, C, T]
        with self._turn, self._step, numeric_mode(self._job.settings.precision, self._device):
            latents = self._model.encode(silence)
        check_encoded(spec, samples, latents.shape)
        origin: FloatArray = latents[0].float().cpu().numpy()
        return origin

    def timings(self) -> dict[str, float]:
        """The counters so far. `steps` grows while the worker makes progress."""
        return {**self._timings.snapshot(), "steps": self._timings.steps}

    @property
    def in_flight(self) -> dict[int, UnitProgress]:
        """Progress of the units in flight, by number."""
        return {number: unit.progress for number, unit in self._underway.copy().items()}

    @property
    def queued(self) -> int:
        """Number of loaded chunks that wait for the model."""
        return sum(stream.queued for stream in tuple(self._streams))

    def close(self) -> None:
        """Release the lock on the store. The end of the process releases it too."""
        self._hold.close()

    def encode(self, unit: Unit, trial_load: bool = False) -> UnitResult:
        """Read a unit's items from the plan, encode them, write their shard and commit it.

        With `trial_load`, each item is loaded on trial first, and those that would end this
        process fail. If an exception is raised, nothing of the unit stays in the store: for
        example SourceError, if items failed because this machine cannot read the source.
        """
        work = self.begin(unit, trial_load=trial_load)
        audio = self._open_audio_of(work.items, work.loading, work.encoder.timings)
        return self.finish(work, audio)

    def begin(
        self, unit: Unit, *, trial_load: bool = False, along: UnitWork | None = None
    ) -> UnitWork:
        """Read a unit's items from the plan and decide what to do with each; see `finish`.

        A field that is computed along with its base (`along`: its work) computes all items.
        """
        began = time.perf_counter()
        job, timings = self._job, Timings(parent=self._timings)
        planned = read_items(self.storage, unit) if along is None else along.planned
        field = self._field_unit(unit, planned, whole=along is not None)
        wanted = planned if field is None else [item for item in planned if item.key in field.todo]
        earlier = EarlierRecords(self.storage, unit) if field is None else field.earlier
        refused = self._refused(wanted, timings) if trial_load else {}
        absent = {} if field is None else field.absent
        # Absent items have a place in the order and the lanes, so that these are as in the base.
        kept = set() if field is None else field.rest
        ordered = [item for item in planned if item.key not in kept]
        return UnitWork(
            unit,
            planned,
            self._reading_order(ordered, {*refused, *absent}) if along is None else along.items,
            field,
            earlier,
            Loading(self._model.spec, job.chunking, job.settings, refused, absent, earlier.encoded),
            UnitEncoder(self._model, job.chunking, job.settings, timings, self._device, self._step),
            began,
        )

    def finish(self, work: UnitWork, audio: UnitAudio, link: Link = ALONE_IN_UNIT) -> UnitResult:
        """Encode the audio of a unit that was begun, write the shard and commit it."""
        job, unit, field, timings = self._job, work.unit, work.field, work.encoder.timings
        underway = Underway(unit, work.items, self._model.spec)
        followed = underway.follow(_or_earlier(audio, work))
        with (
            self._listed(audio, unit, underway),
            contextlib.closing(self._in_turn(work.encoder, followed)) as done,
        ):
            write = partial(
                write_unit,
                self.storage,
                unit.name,
                format_name=job.format,
                fingerprint=job.fingerprint,
                info=job.info,
                revision=unit.revision,
                keys=[item.key for item in work.planned],
                on_bytes=timings.step,
            )
            kept = () if field is None else timings.stepping(field.kept())
            # Tasks load on other nodes, so this one cannot tell whether they have the source.
            found = done if job.load_tasks else checked(done, self.storage, unit)
            commit = written_beside(itertools.chain(kept, link.outcomes(found)), write)
        timings.add("write_seconds", time.perf_counter() - work.encoder.ended)
        inputs = link.inputs(work)
        seconds = {**timings.snapshot(), "total_seconds": time.perf_counter() - work.began}
        commit = commit.model_copy(update={"items_hash": unit.hash})
        if inputs is not None:
            commit = with_audio_inputs(commit, inputs, work.earlier.items, work.planned)
        commit = write_commit(self.storage, commit, seconds)
        link.committed(commit)
        return result_of(unit, commit)

    def _field_unit(self, unit: Unit, planned: Sequence[Item], *, whole: bool) -> FieldUnit | None:
        if self._base is None:
            return None
        earlier = EarlierRecords(self.storage, unit)
        base = None if whole else self._base.of(unit.name)
        inputs = audio_inputs(planned, base, earlier.items.values())
        field = FieldUnit(earlier, inputs, retry_failed=self._job.retry_failed)
        # A unit that was planned again may have files that the store has not encoded yet.
        if base is not None and field.todo and base.items_hash in (None, unit.hash):
            field.encoded_files = self._base.content_hashes(base)
        return field

    def _reading_order(self, planned: Sequence[Item], closed: Collection[str]) -> list[Item]:
        """A unit's items in the order in which they are read, with lengths from short headers.

        A field reads them in the order of its base, so that both can be computed in one pass. Items
        in `closed` are not opened: they may be what has killed the process of an earlier attempt.
        """
        packing = self._job.settings.packing
        if packing < 3:
            return list(planned)
        own = self._job.chunking.samples / self._model.spec.sample_rate
        chunk = self._job.base_chunk_seconds or own
        # Chunks of longer items have the full length, wherever the items are in the order.
        unknown = [
            item
            for item in planned
            if known_seconds(item) is None
            and estimated_seconds(item) < PROBED_CHUNKS * chunk
            and cheap(item)
            and item.key not in closed
        ]
        found = {item.key: item for item in probed(unknown)}
        return reading_order([found.get(item.key, item) for item in planned], packing)

    def _refused(self, items: Sequence[Item], timings: Timings) -> dict[str, str]:
        """Reasons, by key, why items must not be loaded: they kill or hang their process."""
        spec, settings = self._model.spec, self._job.settings
        refused = {}
        with TrialLoader(
            spec.sample_rate,
            spec.channels,
            allow_truncated=settings.allow_truncated,
            hang_seconds=self._job.hang_seconds,
            on_progress=timings.step,
        ) as trials:
            for item in items:
                if self._stopped.is_set():
                    raise Stopped
                if reason := trials.failure_reason(item):
                    refused[item.key] = reason
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

    def _in_turn(self, encoder: UnitEncoder, audio: Iterable[ItemEvent]) -> Generator[Outcome]:
        with self._turn:
            if self._free_since is not None:
                encoder.timings.add("idle_seconds", time.perf_counter() - self._free_since)
                self._free_since = None
            yield from encoder.encode(self._until_stopped(audio))
            self._free_since = encoder.ended if len(self._streams) > 1 else None

    def _until_stopped(self, audio: Iterable[ItemEvent]) -> Iterator[ItemEvent]:
        for event in audio:
            if self._stopped.is_set():
                raise Stopped
            yield event


def _or_earlier(audio: UnitAudio, work: UnitWork) -> Iterator[ItemEvent]:
    """A unit's events. An item that cannot be loaded any more keeps its record."""
    field, earlier = work.field, work.earlier
    for number, item, event in audio:
        final = event
        if isinstance(event, Facts) and field and field.is_other_file(item.key, event.content_hash):
            final = Outcome(item.key, "failed", OTHER_FILE)
        if isinstance(final, Outcome) and final.status == "failed" and item.key in earlier.encoded:
            final = earlier.outcome(item.key, final.reason)
        yield number, item, final


def result_of(unit: Unit, commit: Commit) -> UnitResult:
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
