"""Encodes a unit's audio to latents: batch, encode, stitch. Uses no Ray and no storage.

Chunks of many items are packed into full batches, and each item's latents are stitched. The batches
depend on the unit's items alone, so a unit's latents are the same on every worker.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch

from latentmill.encoding.batches import Batch, Packer
from latentmill.encoding.chunks import Chunk, Chunking, Stitcher
from latentmill.encoding.timings import Meter
from latentmill.encoding.unit_audio import EncodeSettings, Facts, ItemEvent, Opened
from latentmill.models.base import Autoencoder
from latentmill.models.checks import check_encoded
from latentmill.models.inference.compiled import uncompiled
from latentmill.models.inference.device_pipeline import DevicePipeline
from latentmill.models.inference.precision import numeric_mode
from latentmill.record import DTYPES, FloatArray, Outcome, Record
from latentmill.sources.address import address_of
from latentmill.sources.base import Item
from latentmill.text.redact import redact


@dataclass
class _PendingItem:
    """An item that is being encoded."""

    item: Item
    stitcher: Stitcher
    expected: int = 0  # number of chunks packed
    arrived: int = 0  # number of chunks that the model has encoded
    facts: Facts | None = None
    outcome: Outcome | None = None


class UnitEncoder:
    """Encodes units with one model. One unit at a time; not thread-safe."""

    def __init__(
        self,
        model: Autoencoder,
        chunking: Chunking,
        settings: EncodeSettings,
        meter: Meter | None = None,
        device: str = "cpu",
    ) -> None:
        self._model = model
        self._device = device
        self._pipeline = DevicePipeline(model, device, settings.precision)
        self._queued: deque[Batch] = deque()  # in the pipeline
        self._chunking = chunking
        self._settings = settings
        self.meter = meter or Meter()
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
            else:
                pending[number].outcome = event
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
        self._queued.append(batch)
        self._collect(self._pipeline.push(audio), pending)
        self.meter.add("audio_seconds", len(audio) * self._new_seconds(audio.shape[2]))

    def _collect(self, finished: Iterator[FloatArray], pending: dict[int, _PendingItem]) -> None:
        """Add the pipeline's latents to their items."""
        while True:
            start = time.perf_counter()
            latents = next(finished, None)  # [B, D, Z]
            self.meter.add("model_seconds", time.perf_counter() - start)
            if latents is None:
                return
            batch = self._queued.popleft()
            check_encoded(self._model.spec, batch.chunks[0].audio.shape[1], latents.shape)
            if self._settings.precision != "float32" and not self._fits(latents):
                latents = self._encode_in_float32(batch)
            for owner, chunk, latent in zip(batch.owners, batch.chunks, latents, strict=True):
                job = pending.get(owner)
                if job is not None:  # else it failed after this chunk was packed
                    job.arrived += 1
                    job.stitcher.add(chunk.frame, latent)

    def _fits(self, latents: FloatArray) -> bool:
        """Whether all values are finite and in the range of the stored dtype."""
        return bool(np.abs(latents).max() <= np.finfo(DTYPES[self._settings.dtype]).max)

    def _encode_in_float32(self, batch: Batch) -> FloatArray:
        """Encode a batch again in float32, so that its items do not fail for the low precision."""
        with numeric_mode("float32", self._device):
            latents = uncompiled(self._model).encode(torch.from_numpy(batch.audio()))
        exact: FloatArray = latents.float().cpu().numpy()
        return exact

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
            latent = latent.mean(axis=1, dtype=np.float32, keepdims=True).astype(latent.dtype)
        if not job.stitcher.finite:
            return Outcome(job.item.key, "failed", _gate_message(self._settings.dtype))
        spec, metadata = self._model.spec, facts.metadata
        group = job.item.group or metadata.get("group")
        role = job.item.role or metadata.get("role")
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
            group=group if isinstance(group, str) else None,
            role=role if isinstance(role, str) else None,
            metadata=metadata,
        )
        return Outcome(job.item.key, "encoded", record=record)


def _gate_message(dtype: str) -> str:
    if dtype == "float16":
        return "the latents have NaN or values outside float16's range (dtype float32 stores those)"
    return "the latents have NaN or Inf"
