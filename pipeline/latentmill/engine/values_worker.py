"""Computes units of a field from texts, latents or imported values."""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from latentmill.engine.lock import Membership
from latentmill.engine.worker import MAX_REPORTED_FAILURES, UnitResult
from latentmill.errors import LatentmillError, ModelError, StorageError, StoreError
from latentmill.fields.base_rows import BaseRows
from latentmill.fields.imported import ImportedValues
from latentmill.fields.inputs import with_inputs
from latentmill.fields.unit import BaseCommits, FieldUnit
from latentmill.fields.values import LatentValues, Values, values_of
from latentmill.models.embedder import Embedder, EmbedderHandle, checked_embed
from latentmill.models.inference.precision import Precision, numeric_mode
from latentmill.plan import Unit
from latentmill.record import DTYPES, FloatArray, Outcome, Record
from latentmill.storage.storage import Storage
from latentmill.store.commit import Tally, write_commit, write_unit
from latentmill.store.earlier import EarlierRecords
from latentmill.store.schema import ORIGIN_PATH, Commit
from latentmill.store.seal import read_origin, write_origin
from latentmill.store.store import LatentStore
from latentmill.text.log import get_logger

_log = get_logger("add")

ATTEMPTS = 3  # to write a unit
REASON_LENGTH = 300
_FIELDS = (
    "num_samples",
    "sample_rate",
    "source_uri",
    "source_sample_rate",
    "source_channels",
    "content_hash",
    "rms",
    "peak",
    "group",
    "role",
)


@dataclass(frozen=True)
class ValuesJob:
    """What a worker needs to compute any unit of a field. It is pickled for tasks.

    Attributes:
        base: The base store.
        store: The folder of the field.
        owner: The id in the run's lease on the field, if it has one.
        source: What the values are computed from.
        model: The embedder.
        device: Its torch device.
        precision: Its numeric mode.
        batch_size: Maximum number of values of a call.
        dtype: The stored dtype.
        format: The format of the shards.
        fingerprint: The fingerprint of the field.
        info: What a reader of a shard alone needs to know.
        retry_failed: Whether failed items are computed again.
    """

    base: str
    store: str
    owner: str | None
    source: str
    model: EmbedderHandle
    device: str
    precision: Precision
    batch_size: int
    dtype: str
    format: str
    fingerprint: str
    info: Mapping[str, Any]
    retry_failed: bool


@dataclass(frozen=True)
class _Refused:
    """A value that the model cannot embed."""

    reason: str


class ValuesWorker:
    """Computes units; loads the model for the first one."""

    def __init__(self, job: ValuesJob, values: Values | None = None) -> None:
        self._job = job
        if values is None:  # in a task, which computes some of the units
            base = Storage(job.base)
            values = values_of(base, job.source, from_shards=not base.local)
        self._values = values
        self._commits = BaseCommits(job.base)
        self._rows = BaseRows(LatentStore(job.base))
        self._embedder: Embedder | None = None

    def __call__(self, unit: Unit) -> UnitResult:
        """Compute a unit, write its shard and commit it.

        Raises:
            StoreError: Another run has taken over, or the base store has lost the unit.
            StorageError: The unit cannot be written.
        """
        job = self._job
        with contextlib.closing(Membership(Storage(job.store), job.owner)) as membership:
            for attempt in itertools.count(1):
                try:
                    self._write_origin(membership.storage)
                    return self._compute(unit, membership.storage)
                except StorageError:
                    if attempt == ATTEMPTS:
                        raise
        raise AssertionError("the loop ends by return or raise")

    def write_origin(self) -> None:
        """Write the origin of the field, unless it has been written before."""
        with contextlib.closing(Membership(Storage(self._job.store), self._job.owner)) as member:
            self._write_origin(member.storage)

    def _write_origin(self, storage: Storage) -> None:
        if not storage.exists(ORIGIN_PATH):
            write_origin(storage, self._origin())

    def _compute(self, unit: Unit, storage: Storage) -> UnitResult:
        began = time.perf_counter()
        job, base = self._job, self._commits.of(unit.name)
        if base is None:
            raise StoreError(
                f"Unit {unit.name} of {job.base} is not encoded any more: finish the run that "
                "encodes it, then rerun the `latentmill add` command of the field."
            )
        fields = self._rows.fields(base)
        inputs = self._values.of(unit, base, None)
        earlier = EarlierRecords(storage, unit)
        part = FieldUnit(earlier, inputs, retry_failed=job.retry_failed)
        todo = [key for key in inputs if key in part.todo]
        computed = self._outcomes(base, fields, todo)
        commit = write_unit(
            storage,
            unit.name,
            itertools.chain(part.skipped(), part.kept(), computed),
            format_name=job.format,
            fingerprint=job.fingerprint,
            info=job.info,
            revision=unit.revision,
            keys=list(inputs),
        )
        seconds = time.perf_counter() - began
        commit = with_inputs(commit.model_copy(update={"items_hash": unit.hash}), inputs)
        tally = Tally.of(write_commit(storage, commit, {"total_seconds": seconds}))
        return UnitResult(
            unit=unit.number,
            encoded=tally.encoded,
            skipped=tally.skipped,
            failed=tally.failed,
            audio_seconds=tally.audio_seconds,
            failures=tally.failures[:MAX_REPORTED_FAILURES],
            timings=dict(tally.timings),
        )

    def _outcomes(
        self, base: Commit, fields: Mapping[str, Mapping[str, Any]], keys: Sequence[str]
    ) -> Iterator[Outcome]:
        """Embed the values of some items; similar lengths are in one batch."""
        if not keys:
            return
        values = list(self._values.read(base, keys)) if not self._large else None
        order = list(range(len(keys)))
        if values is not None:
            order.sort(key=lambda number: (_length(values[number]), number))
        for start in range(0, len(order), self._job.batch_size):
            some = order[start : start + self._job.batch_size]
            names = [keys[number] for number in some]
            batch = (
                [values[number] for number in some]
                if values is not None
                else list(self._values.read(base, names))
            )
            for key, value, found in zip(names, batch, self._embed(batch), strict=True):
                if isinstance(found, _Refused):
                    yield Outcome(key, "failed", found.reason)
                else:
                    yield self._outcome(key, value, found, fields[key])

    @property
    def _large(self) -> bool:
        """Whether the values of a unit are too large to be in memory together."""
        return isinstance(self._values, LatentValues | ImportedValues)

    def _embed(self, values: Sequence[Any]) -> list[FloatArray | _Refused]:
        """Embed values, in halves if the model raises: one value must not end every run."""
        import torch

        model = self._model()
        try:
            with numeric_mode(self._job.precision, self._job.device):
                return [*checked_embed(model, values)]
        except LatentmillError:
            raise
        except torch.AcceleratorError as error:  # the process cannot use the device any more
            raise ModelError(
                f"Model {model.spec.name} stopped the device ({_first_line(error)}): "
                "run again with --device cpu to see which item it fails on."
            ) from error
        except Exception as error:  # noqa: BLE001  a model may raise anything
            if len(values) == 1:
                return [_Refused(f"the model cannot take it: {_first_line(error)}")]
        if self._job.device.startswith("cuda"):
            torch.cuda.empty_cache()
        middle = len(values) // 2
        return self._embed(values[:middle]) + self._embed(values[middle:])

    def _model(self) -> Embedder:
        if self._embedder is None:
            self._embedder = self._job.model.load(self._job.device)
        return self._embedder

    def _outcome(self, key: str, value: Any, array: FloatArray, row: Mapping[str, Any]) -> Outcome:
        dtype = DTYPES[self._job.dtype]
        if not array.shape[1]:
            return Outcome(key, "failed", "the model gives no values for it")
        with np.errstate(over="ignore"):
            stored = np.asfortranarray(array.astype(dtype))
        if not np.isfinite(stored).all():
            if self._job.dtype != "float32" and np.isfinite(array).all():
                reason = f"its values exceed {self._job.dtype} (--dtype float32 stores those)"
            else:
                reason = "its values have NaN or infinity"
            return Outcome(key, "failed", reason)
        if not self._exact(value, array, stored):
            advice = "" if self._job.dtype == "float32" else " (--dtype float32 stores larger ones)"
            reason = f"its whole numbers are not exact in {self._job.dtype}{advice}"
            return Outcome(key, "failed", reason)
        name = self._job.source.removeprefix("metadata:")
        return Outcome(
            key,
            "encoded",
            record=Record(
                key=key,
                latent=stored,
                metadata={name: value} if isinstance(value, str) else {},
                **{field: row[field] for field in _FIELDS},
            ),
        )

    def _exact(self, value: Any, array: FloatArray, stored: Any) -> bool:
        """Whether codes, and imported whole numbers, are stored as they are."""
        if isinstance(self._values, ImportedValues) and value.dtype.kind in "iu":
            return np.array_equal(stored.astype(value.dtype), value)
        return self._job.model.spec.kind != "codes" or np.array_equal(stored, array)

    def _origin(self) -> FloatArray:
        """The embedding of the empty text, or of the origin of the base store; or zeros."""
        spec, nothing = self._job.model.spec, np.zeros((self._job.model.spec.dimensions, 1))
        if self._job.source.startswith("metadata:"):
            (origin,) = self._embed([""])
        elif self._job.source == "latents":
            (origin,) = self._embed([read_origin(Storage(self._job.base))])
        else:
            return nothing.astype(np.float32)
        if isinstance(origin, _Refused):
            what = "empty text" if self._job.source.startswith("metadata:") else "latent of silence"
            _log.warning("%s: the %s has zeros as its value: %s", spec.name, what, origin.reason)
            return nothing.astype(np.float32)
        return origin if origin.shape[1] else nothing.astype(np.float32)


@dataclass
class UnitTask:
    """A `ValuesWorker` for Ray tasks: each process makes its own for its first unit."""

    job: ValuesJob
    _worker: ValuesWorker | None = field(default=None, compare=False)

    def __call__(self, unit: Unit) -> UnitResult:
        if self._worker is None:
            self._worker = ValuesWorker(self.job)
        return self._worker(unit)


def _first_line(error: Exception) -> str:
    lines = str(error).splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"[:REASON_LENGTH]


def _length(value: Any) -> int:
    return len(value) if isinstance(value, str) else int(value.shape[-1])
