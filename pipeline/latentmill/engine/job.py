"""Makes the `Job` of a run's workers from its configuration. Does not import Ray."""

from __future__ import annotations

import logging
from dataclasses import fields

from latentmill.config import RunConfig
from latentmill.encoding.chunks import Chunking
from latentmill.encoding.fingerprint import fingerprint
from latentmill.encoding.loading import EncodeSettings
from latentmill.engine.worker import Job
from latentmill.models.base import ModelHandle
from latentmill.models.inference.batch import check_batch
from latentmill.plan import Plan, load
from latentmill.sources.filters import Filters
from latentmill.storage.storage import Storage
from latentmill.store.field_layout import base_url
from latentmill.text.log import ROOT

LOAD_THREADS = 2


def make_job(
    config: RunConfig,
    handle: ModelHandle,
    chunking: Chunking,
    plan: Plan,
    *,
    device: str,
    threads: int,
) -> Job:
    """The job of a run's workers. Raises ConfigError if the batches are too large for the model."""
    if device == "cuda":  # without batch_size, the smallest batch that is tried is one chunk
        check_batch(handle.spec, chunking.samples, config.batch_size or 1)
    base = None if plan.field is None else base_url(Storage(config.out).root)
    return Job(
        model=handle,
        chunking=chunking,
        settings=EncodeSettings(
            dtype=config.dtype,
            precision=plan.fingerprint["numeric"]["precision"],
            batch_size=config.batch_size
            or handle.spec.batch_size["cuda" if device == "cuda" else "cpu"],
            load_threads=config.load_threads or LOAD_THREADS,
            load_timeout=config.load_timeout,
            allow_truncated=config.allow_truncated,
            allow_changed=config.retry_failed,  # a repaired file differs from the planned one
            packing=plan.packing,
            pooled=plan.field is not None and plan.field.is_pooled,
            filters=Filters(**{one.name: getattr(config, one.name) for one in fields(Filters)}),
        ),
        store=Storage(config.out).root,
        format=config.format,
        fingerprint=fingerprint(plan.fingerprint),
        info={
            "model": plan.fingerprint["model"],
            "dtype": config.dtype,
            "layout": "chunks" if chunking.stitch == "none" else "time-major",
            "fingerprint": fingerprint(plan.fingerprint),
        },
        base=base,
        base_chunk_seconds=None if base is None else _chunk_seconds(base),
        retry_failed=config.retry_failed,
        device=device,
        threads=threads,
        compile=config.compile,
        load_tasks=config.load_tasks,
        auto_batch=config.batch_size is None,
        log_level=logging.getLogger(ROOT).getEffectiveLevel(),
    )


def _chunk_seconds(store: str) -> float | None:
    """The length of a store's chunks; None if it has no plan."""
    plan = load(Storage(store))
    if plan is None:
        return None
    seconds: float = (
        plan.fingerprint["chunking"]["samples"] / plan.fingerprint["model"]["sample_rate"]
    )
    return seconds
