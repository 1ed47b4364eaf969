"""What a run will come to, before it: the frozen plan in numbers, and a short calibration."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from latentmill.config import DEFAULT_CPU_THREADS, RunConfig
from latentmill.encoding.chunks import Chunking
from latentmill.engine.lock import only_run
from latentmill.models.base import ModelHandle
from latentmill.models.inference.device import pick_device
from latentmill.models.inference.precision import numeric_mode
from latentmill.run.prepare import (
    Extension,
    PlanningObserver,
    Preparation,
    listed,
    planned,
    prepare,
)
from latentmill.store.commit import committed_units

CALIBRATION_SECONDS = 3.0


@dataclass(frozen=True)
class Calibration:
    """How fast one worker's model is on this machine.

    Attributes:
        device: Where it ran.
        x_real_time: Seconds of audio that it encodes in a second; decoding not counted.
        workers: Workers that a run on this machine has, by the same settings.
    """

    device: str
    x_real_time: float
    workers: int


@dataclass(frozen=True)
class Forecast:
    """What a plan comes to.

    Attributes:
        store: Where the plan is frozen.
        source: The source.
        items: Items of the plan.
        units: Units of the plan, and how many of them are committed already.
        hours: Audio, as far as it is known; the rest estimated.
        estimated_items: Items whose length is estimated, and their part of the hours.
        source_bytes: Encoded audio, as the listing gave it.
        formats: Items by file name extension.
        ignored: Files of the source that are no items, counted by extension or reason.
        latent_bytes: Estimated size of all shards.
        run_seconds: Estimated time until the rest is encoded, by the calibration.
        calibration: How that was measured; None: it was not.
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
    run_seconds: float | None = None
    calibration: Calibration | None = None
    extension: Extension | None = None


def forecast(
    config: RunConfig, observer: PlanningObserver | None = None, *, calibrated: bool = True
) -> Forecast:
    """Freeze the plan that `encode` with the same settings then resumes, and say what it means.

    Args:
        config: The run.
        listener: Is told how far listing is.
        calibrated: Whether to load the model and encode a few chunks with it.

    Raises:
        LatentmillError: The source, the store or the model cannot be used.
    """
    prepared = prepare(config, observer)
    storage = prepared.storage
    items = listed(prepared)
    with items or contextlib.nullcontext(), only_run(storage) as hold:
        plan, extension = planned(replace(prepared, storage=hold.storage), items)
        storage.clear_scratch()
    committed = set(committed_units(storage))
    todo = sum(unit.seconds for unit in plan.units if unit.name not in committed)
    calibration = _calibrate(prepared) if calibrated and todo else None
    run_seconds = None
    if calibration is not None:
        run_seconds = todo / (calibration.x_real_time * calibration.workers)
    return Forecast(
        store=storage.root,
        source=plan.source,
        items=plan.num_items,
        units=len(plan.units),
        committed=len(committed),
        hours=plan.seconds / 3600,
        estimated_items=sum(part.estimated_items for part in plan.parts),
        estimated_hours=sum(part.estimated_seconds for part in plan.parts) / 3600,
        source_bytes=sum(part.bytes for part in plan.parts),
        formats=dict(plan.formats.most_common()),
        ignored=plan.ignored,
        latent_bytes=round(plan.seconds * prepared.bytes_per_second),
        run_seconds=run_seconds,
        calibration=calibration,
        extension=extension,
    )


def _calibrate(prepared: Preparation) -> Calibration:
    config = prepared.config
    device = pick_device(config.device)
    cpus = os.cpu_count() or 1
    threads = config.threads or max(1, min(DEFAULT_CPU_THREADS, cpus))
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
    """Encode batches of noise for some seconds; gives the speed as a multiple of real time."""
    model = handle.load(device)
    spec = handle.spec
    audio = torch.empty(batch, spec.channels, chunking.model_samples(spec))  # [B, C, T]
    audio.uniform_(-0.5, 0.5, generator=torch.Generator().manual_seed(0))
    model.encode(audio).cpu()  # the first one prepares things
    began, batches = time.perf_counter(), 0
    while batches == 0 or time.perf_counter() - began < seconds:
        model.encode(audio).cpu()
        batches += 1
    encoded = batches * batch * chunking.step / spec.sample_rate
    return encoded / (time.perf_counter() - began)
