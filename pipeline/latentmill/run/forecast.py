"""Estimates a run's size and time from its plan and a short speed measurement."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from latentmill.config import RunConfig
from latentmill.encoding.batches import LONG_BATCH_SECONDS, expected_batches
from latentmill.encoding.chunks import Chunking
from latentmill.engine.lock import only_run
from latentmill.models.base import ModelHandle
from latentmill.models.inference.device import load_model, pick_device
from latentmill.models.inference.precision import numeric_mode
from latentmill.plan import Plan, read_items
from latentmill.plan.items import estimated_seconds
from latentmill.run.prepare import (
    Extension,
    PlanningObserver,
    Preparation,
    listed,
    planned,
    prepare,
)
from latentmill.run.run import finished_units
from latentmill.run.with_fields import FieldsOfRun

SAMPLED_UNITS, SAMPLED_ITEMS = 16, 30_000  # whose batches are computed; about a second
CALIBRATION_SECONDS = 3.0


@dataclass(frozen=True)
class Calibration:
    """Speed of one worker's model on this machine.

    Attributes:
        device: Device of the measurement.
        x_real_time: Seconds of audio encoded per second, without loading audio.
        workers: Number of workers of a run on this machine with the same settings.
    """

    device: str
    x_real_time: float
    workers: int


@dataclass(frozen=True)
class Forecast:
    """Size of a plan and estimated time of its run.

    Attributes:
        store: Root of the store.
        source: URI of the source.
        items: Number of items.
        units: Number of units.
        committed: Number of units that are committed already and would not be encoded again.
        hours: Hours of audio; unknown lengths are estimated.
        estimated_items: Number of items whose length is estimated.
        estimated_hours: The hours of those items.
        source_bytes: Size of the source's audio files, from the listing.
        formats: Number of items by file name extension.
        ignored: Number of files that are not items, by extension or reason.
        latent_bytes: Estimated size of all shards.
        long_batches: Share of the audio in batches of at least `LONG_BATCH_SECONDS` on a GPU,
            estimated from some units; 0 to 1.
        gpu_batch_size: Chunks in a full batch for this estimate. Without `batch_size`, a run on a
            GPU finds the best size first.
        run_seconds: Estimated time to encode the remaining units; None without a calibration.
        calibration: The speed measurement, or None if there was none.
        extension: What `extend` found.
    """

    store: str
    source: str
    items: int
    units: int
    committed: int
    hours: float
    estimated_items: int
    estimated_hours: float
    source_bytes: int
    formats: Mapping[str, int]
    ignored: Mapping[str, int]
    latent_bytes: int
    long_batches: float
    gpu_batch_size: int
    run_seconds: float | None = None
    calibration: Calibration | None = None
    extension: Extension | None = None


def forecast(
    config: RunConfig, observer: PlanningObserver | None = None, *, calibrated: bool = True
) -> Forecast:
    """Write the plan, which `encode` with the same settings resumes, and estimate its run.

    `calibrated` loads the model and measures its speed on a few chunks.
    """
    prepared = prepare(config, observer)
    if config.with_fields:
        FieldsOfRun(config)  # checks them; the estimate is that of the store
    storage = prepared.storage
    items = listed(prepared)
    with items or contextlib.nullcontext(), only_run(storage) as hold:
        plan, extension, _ = planned(replace(prepared, storage=hold.storage), items)
        storage.clear_scratch()
        finished, _ = finished_units(prepared, plan)
    todo = sum(unit.seconds for unit in plan.units if unit.name not in finished)
    calibration = _calibrate(prepared) if calibrated and todo else None
    batch_size = config.batch_size or prepared.handle.spec.batch_size["cuda"]
    run_seconds = None
    if calibration is not None:
        run_seconds = todo / (calibration.x_real_time * calibration.workers)
    return Forecast(
        store=storage.root,
        source=plan.source,
        items=plan.num_items,
        units=len(plan.units),
        committed=len(finished),
        hours=plan.seconds / 3600,
        estimated_items=sum(part.estimated_items for part in plan.parts),
        estimated_hours=sum(part.estimated_seconds for part in plan.parts) / 3600,
        source_bytes=sum(part.bytes for part in plan.parts),
        formats=dict(plan.formats.most_common()),
        ignored=plan.ignored,
        latent_bytes=round(plan.seconds * prepared.bytes_per_second),
        long_batches=_long_batches(prepared, plan, batch_size),
        gpu_batch_size=batch_size,
        run_seconds=run_seconds,
        calibration=calibration,
        extension=extension,
    )


def _long_batches(prepared: Preparation, plan: Plan, batch_size: int) -> float:
    spec = prepared.handle.spec
    long = total = items = 0
    # Units far apart, because neighbours can have items of similar lengths.
    count = len(plan.units)
    for n in range(SAMPLED_UNITS):
        if n >= count or items >= SAMPLED_ITEMS:
            break
        unit = plan.units[n * count // min(count, SAMPLED_UNITS)]
        for rows, samples in expected_batches(
            read_items(prepared.storage, unit),
            estimated_seconds,
            spec,
            prepared.chunking,
            batch_size,
            plan.packing,
        ):
            total += rows * samples
            if rows * samples >= LONG_BATCH_SECONDS * spec.sample_rate:
                long += rows * samples
        items += unit.items
    return long / total if total else 0.0


def _calibrate(prepared: Preparation) -> Calibration:
    config = prepared.config
    device = pick_device(config.device)
    cpus = os.cpu_count() or 1
    threads = config.cpu_threads(cpus)
    machines = torch.cuda.device_count() if device.startswith("cuda") else cpus // threads
    kind = "cuda" if device.startswith("cuda") else "cpu"
    batch = config.batch_size or prepared.handle.spec.batch_size[kind]
    assert config.precision is not None, "prepare settles it"
    before = torch.get_num_threads()
    if device == "cpu":
        torch.set_num_threads(threads)
    try:
        with numeric_mode(config.precision, device):
            rate = measure(prepared.handle, prepared.chunking, device, batch)
    finally:
        torch.set_num_threads(before)
    return Calibration(device, rate, config.workers or max(1, machines))


def measure(
    handle: ModelHandle,
    chunking: Chunking,
    device: str,
    batch: int,
    seconds: float = CALIBRATION_SECONDS,
) -> float:
    """Encode batches of noise for some seconds. Returns the speed as a multiple of real time."""
    model = load_model(handle, device)
    spec = handle.spec
    shape = batch, spec.channels, chunking.model_samples(spec)  # [B, C, T]
    audio = torch.empty(shape, dtype=torch.float32, device="cpu")
    audio.uniform_(-0.5, 0.5, generator=torch.Generator().manual_seed(0))
    model.encode(audio).cpu()  # warm-up
    began, batches = time.perf_counter(), 0
    while batches == 0 or time.perf_counter() - began < seconds:
        model.encode(audio).cpu()
        batches += 1
    encoded = batches * batch * chunking.step / spec.sample_rate
    return encoded / (time.perf_counter() - began)
