"""From a configuration to running actors: connect to Ray, choose devices, schedule the units."""

from __future__ import annotations

from latentmill.chunks import Chunking
from latentmill.config import RunConfig, fingerprint
from latentmill.encode import EncodeSettings
from latentmill.engine.actor import ActorShape
from latentmill.engine.cluster import Cluster, connect
from latentmill.engine.progress import Progress
from latentmill.engine.scheduler import Scheduler
from latentmill.engine.worker import Job
from latentmill.errors import ConfigError
from latentmill.models.base import ModelHandle
from latentmill.plan import Plan, Unit
from latentmill.storage import Storage
from latentmill.store.schema import ORIGIN_PATH
from latentmill.store.seal import write_origin

DEFAULT_CPU_THREADS = 4


def encode_units(
    config: RunConfig,
    handle: ModelHandle,
    chunking: Chunking,
    plan: Plan,
    todo: list[Unit],
    progress: Progress,
) -> None:
    """Connect to Ray and run the units on as many actors as it has GPUs, or CPU cores for.

    Raises:
        LatentmillError: See `Scheduler.run` and `connect`.
    """
    storage = Storage(config.out)
    with connect(config.address) as cluster:
        device = _device(config, cluster)
        threads = config.threads or min(DEFAULT_CPU_THREADS, cluster.cpus)
        on_gpu = device.startswith("cuda")
        default_workers = cluster.gpus if on_gpu else max(1, cluster.cpus // threads)
        job = Job(
            model=handle,
            chunking=chunking,
            settings=EncodeSettings(
                dtype=config.dtype,
                batch_size=config.batch_size or handle.spec.batch_size["cuda" if on_gpu else "cpu"],
                decode_threads=config.decode_threads,
                allow_truncated=config.allow_truncated,
                min_seconds=config.min_seconds,
                max_seconds=config.max_seconds,
            ),
            store=storage.root,
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
        )
        workers = config.workers or default_workers
        shape = ActorShape(cpus=0 if on_gpu else min(threads, cluster.cpus / workers), gpus=on_gpu)
        scheduler = Scheduler(job, shape, workers, progress)
        needs_origin = not storage.exists(ORIGIN_PATH)
        scheduler.run(
            todo, (lambda origin: write_origin(storage, origin)) if needs_origin else None
        )


def _device(config: RunConfig, cluster: Cluster) -> str:
    if config.device == "auto":
        return "cuda" if cluster.gpus else "cpu"
    if config.device.startswith("cuda") and not cluster.gpus:
        raise ConfigError("Device cuda was asked for, but Ray has no GPUs: use device cpu.")
    return config.device
