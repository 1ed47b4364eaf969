"""From a configuration to what a worker needs to know. No Ray, so that a worker runs without it."""

from __future__ import annotations

from dataclasses import fields

from latentmill.config import RunConfig
from latentmill.encoding.chunks import Chunking
from latentmill.encoding.unit_audio import EncodeSettings
from latentmill.engine.worker import Job
from latentmill.fingerprint import fingerprint
from latentmill.models.base import ModelHandle
from latentmill.models.inference.batch import check_batch
from latentmill.plan import Plan
from latentmill.sources.filters import Filters
from latentmill.storage.storage import Storage

DECODE_THREADS = 2


def make_job(
    config: RunConfig,
    handle: ModelHandle,
    chunking: Chunking,
    plan: Plan,
    *,
    device: str,
    threads: int,
) -> Job:
    """What the workers of a run need to know.

    Raises:
        ConfigError: The batches are too large for the model.
    """
    if device == "cuda":  # one chunk is the least that is tried where batch_size is not set
        check_batch(handle.spec, chunking.samples, config.batch_size or 1)
    return Job(
        model=handle,
        chunking=chunking,
        settings=EncodeSettings(
            dtype=config.dtype,
            precision=plan.fingerprint["numeric"]["precision"],
            batch_size=config.batch_size
            or handle.spec.batch_size["cuda" if device == "cuda" else "cpu"],
            decode_threads=config.decode_threads or DECODE_THREADS,
            decode_timeout=config.decode_timeout,
            allow_truncated=config.allow_truncated,
            allow_changed=config.retry_failed,  # a file that was mended is another file
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
        device=device,
        threads=threads,
        compile=config.compile,
        decode_tasks=config.decode_tasks,
        auto_batch=config.batch_size is None,
    )
