"""Encodes a unit's audio to latents: batch, encode, stitch. Uses no Ray and no storage.

Chunks of many items are packed into full batches, and each item's latents are stitched. The batches
depend on the unit's items alone, so a unit's latents are the same on every worker. With `stitch:
state` the state after an item's chunk is kept for its next one: for the items that are read, one
for each lane, and for at most as many last chunks that wait for a batch.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import numpy as np
import torch

from latentmill.encoding.batches import Batch, Packer
from latentmill.encoding.chunks import Chunk, Chunking, Stitcher
from latentmill.encoding.loading import EncodeSettings, Facts, ItemEvent, Opened
from latentmill.encoding.timings import Timings
from latentmill.models.base import Autoencoder, StatefulAutoencoder
from latentmill.models.checks import check_encoded
from latentmill.models.inference.compiled import uncompiled
from latentmill.models.inference.device_pipeline import ALONE, DevicePipeline
from latentmill.models.inference.precision import numeric_mode
from latentmill.record import DTYPES, FloatArray, Outcome, Record
from latentmill.sources.address import address_of
from latentmill.sources.base import Item
from latentmill.sources.group import name_in
from latentmill.text.redact import redact

if TYPE_CHECKING:
    from latentmill.models.base import State


@dataclass
class _PendingItem:
    """An item that is being encoded."""

    item: Item
    stitcher: Stitcher
    expected: int = 0  # number of chunks packed
    queued: int = 0  # number of chunks given to the model
    arrived: int = 0  # number of chunks that the model has encoded
    facts: Facts | None = None
    outcome: Outcome | None = None
    state: State | None = None  # of the model after the last queued chunk

    def drop_state(self) -> None:
        """Drop the state if no chunk will need it."""
        if self.queued == self.expected and (self.facts or self.outcome):
            self.state = None


@dataclass
class _QueuedBatch:
    """A batch in the pipeline, with the states before it (`stitch: state`, low precision)."""

    batch: Batch
    states: list[State | None]


class UnitEncoder:
    """Encodes units with one model. One unit at a time; not thread-safe."""

    def __init__(
        self,
        model: Autoencoder,
        chunking: Chunking,
        settings: EncodeSettings,
        timings: Timings | None = None,
        device: str = "cpu",
        step: AbstractContextManager[object] = ALONE,
    ) -> None:
        """`step` is held while the model encodes a batch; see `DevicePipeline`."""
        self._model = model
        self._device = device
        self._step = step
        self._pipeline = DevicePipeline(model, device, settings.precision, step=step)
        self._queued: deque[_QueuedBatch] = deque()  # in the pipeline
        self._chunking = chunking
        self._settings = settings
        self.timings = timings or Timings()
        self.ended = 0.0  # perf_counter() after a unit's last outcome was taken

    def encode(self, audio: Iterable[ItemEvent]) -> Iterator[Outcome]:
        """Encode a unit's audio from a `UnitAudio`. Yields outcomes in the order in which
        its items were given.
        """
        packer = Packer(self._chunking, self._settings.batch_size, self._settings.packing)
        pending: dict[int, _PendingItem] = {}  # by the item's number in the unit
        done = 0  # number of items whose outcome was yielded
        for number, item, event in audio:
            if isinstance(event, Opened):
                stitcher = Stitcher(self._chunking, DTYPES[self._settings.dtype], event.frames)
                pending[number] = _PendingItem(item, stitcher)
            elif isinstance(event, Chunk):
                pending[number].expected += 1
                for batch in packer.add(number, event):
                    self._run(batch, pending)
            elif isinstance(event, Facts):
                pending[number].facts = event
                pending[number].drop_state()
            else:
                pending[number].outcome = event
                pending[number].drop_state()
            for outcome in self._outcomes(pending, done):
                done += 1
                yield outcome
        for batch in packer.flush():
            self._run(batch, pending)
        self._collect(self._pipeline.flush(), pending)
        yield from self._outcomes(pending, done)
        assert not pending, "every item of the unit is accounted for"
        self.ended = time.perf_counter()

    def _run(self, batch: Batch, pending: dict[int, _PendingItem]) -> None:
        audio = batch.audio(out=self._pipeline.stage(batch.shape))  # [B, C, T]
        jobs = [pending.get(owner) for owner in batch.owners]  # None: it failed before
        states = [None if job is None else job.state for job in jobs]
        exact = self._settings.precision == "float32"  # else it may be encoded again from these
        self._queued.append(_QueuedBatch(batch, [] if exact else states))
        if self._chunking.stitch == "state":
            start = time.perf_counter()
            after = self._pipeline.step(audio, states)
            self.timings.add("model_seconds", time.perf_counter() - start)
            for job, state in zip(jobs, after, strict=True):
                if job is not None:
                    job.queued += 1
                    job.state = state
                    job.drop_state()
            finished = self._pipeline.finished()
        else:
            finished = self._pipeline.push(audio)
        self._collect(finished, pending)
        self.timings.add("audio_seconds", len(audio) * self._new_seconds(audio.shape[2]))

    def _collect(self, finished: Iterator[FloatArray], pending: dict[int, _PendingItem]) -> None:
        """Add the pipeline's latents to their items."""
        while True:
            start = time.perf_counter()
            latents = next(finished, None)  # [B, D, Z]
            self.timings.add("model_seconds", time.perf_counter() - start)
            if latents is None:
                return
            queued = self._queued.popleft()
            batch = queued.batch
            check_encoded(self._model.spec, batch.chunks[0].audio.shape[1], latents.shape)
            if self._settings.precision != "float32" and not self._fits(latents):
                latents = self._encode_in_float32(queued, pending)
            for owner, chunk, latent in zip(batch.owners, batch.chunks, latents, strict=True):
                job = pending.get(owner)
                if job is not None:  # else it failed after this chunk was packed
                    job.arrived += 1
                    job.stitcher.add(chunk.frame, latent)

    def _fits(self, latents: FloatArray) -> bool:
        """Whether all values are finite and in the range of the stored dtype."""
        return bool(np.abs(latents).max() <= np.finfo(DTYPES[self._settings.dtype]).max)

    def _encode_in_float32(
        self, queued: _QueuedBatch, pending: dict[int, _PendingItem]
    ) -> FloatArray:
        """Encode a batch again in float32, so that its items do not fail for the low precision."""
        audio, model = torch.from_numpy(queued.batch.audio()), uncompiled(self._model)
        with self._step, numeric_mode("float32", self._device):
            if self._chunking.stitch == "state":
                stateful = cast(StatefulAutoencoder, model)
                latents, after = stateful.encode_step(audio, queued.states)
                for owner, state in zip(queued.batch.owners, after, strict=True):
                    self._replace_state(owner, state, pending)
            else:
                latents = model.encode(audio)
        exact: FloatArray = latents.float().cpu().numpy()
        return exact

    def _replace_state(self, owner: int, state: State, pending: dict[int, _PendingItem]) -> None:
        """Replace an item's state after the batch that was just collected.

        If the next chunk is in the pipeline, it was encoded with the state of low precision. If
        its latents do not fit for that reason, it is encoded again with this state.
        """
        for later in self._queued:
            if owner in later.batch.owners:
                later.states[later.batch.owners.index(owner)] = state
                return
        job = pending.get(owner)
        if job is not None and job.state is not None:
            job.state = state

    def _new_seconds(self, length: int) -> float:
        """Seconds of audio that a chunk adds, without its overlap with the previous chunk."""
        return min(length, self._chunking.step) / self._model.spec.sample_rate

    def _outcomes(self, pending: dict[int, _PendingItem], number: int) -> Iterator[Outcome]:
        """Yield outcomes in order, from an item up to the first one that is not complete."""
        while (job := pending.get(number)) is not None:
            if job.outcome is None:
                if job.facts is None or job.arrived < job.expected:
                    return
                job.outcome = self._finish(job, job.facts)
            del pending[number]
            number += 1
            yield job.outcome

    def _finish(self, job: _PendingItem, facts: Facts) -> Outcome:
        latent = job.stitcher.finish()
        if self._settings.pooled and latent.size:
            # By the samples of each window: the last one may have a few only.
            hop = self._model.spec.hop
            lengths = np.clip(facts.num_samples - hop * np.arange(latent.shape[1]), 0, hop)
            mean = np.average(latent, axis=1, weights=lengths, keepdims=True)
            latent = mean.astype(latent.dtype)
        if not job.stitcher.finite:
            return Outcome(job.item.key, "failed", _gate_message(self._settings.dtype))
        spec, metadata = self._model.spec, facts.metadata
        record = Record(
            key=job.item.key,
            latent=latent,
            num_samples=facts.num_samples,
            sample_rate=spec.sample_rate,
            source_uri=redact(address_of(job.item)),
            source_sample_rate=facts.source_sample_rate,
            source_channels=facts.source_channels,
            content_hash=facts.content_hash,
            rms=facts.rms,
            peak=facts.peak,
            # With stitch none, chunks overlap.
            levels=facts.levels if latent.ndim == 2 and not self._settings.pooled else None,
            group=job.item.group or name_in(metadata, "group"),
            role=job.item.role or name_in(metadata, "role"),
            metadata=metadata,
        )
        return Outcome(job.item.key, "encoded", record=record)


def _gate_message(dtype: str) -> str:
    if dtype == "float16":
        return "the latents have NaN or values outside float16's range (dtype float32 stores those)"
    return "the latents have NaN or Inf"
