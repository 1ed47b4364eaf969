"""From a configuration to running actors: connect to Ray, choose devices, schedule the units."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

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
        resources = _resources(config, cluster, on_gpu=device == "cuda")
        job = make_job(config, handle, chunking, plan, device=device, threads=resources.threads)
        write = partial(write_origin, storage)
        has_origin = len(todo) < len(plan.units) and storage.exists(ORIGIN_PATH)
        scheduler = Scheduler(job, resources.shape, resources.workers, progress)
        scheduler.run(todo, (lambda _: None) if has_origin else write)


def make_job(
    config: RunConfig,
    handle: ModelHandle,
    chunking: Chunking,
    plan: Plan,
    *,
    device: str,
    threads: int,
) -> Job:
    """What the workers of a run need to know."""
    return Job(
        model=handle,
        chunking=chunking,
        settings=EncodeSettings(
            dtype=config.dtype,
            precision=plan.fingerprint["numeric"]["precision"],
            batch_size=config.batch_size
            or handle.spec.batch_size["cuda" if device == "cuda" else "cpu"],
            decode_threads=config.decode_threads,
            allow_truncated=config.allow_truncated,
            allow_changed=config.retry_failed,  # a file that was mended is another file
            min_seconds=config.min_seconds,
            max_seconds=config.max_seconds,
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
    )


def cluster_device(config: RunConfig) -> str:
    """Ask the cluster where the workers will run: `cpu` or `cuda`.

    Raises:
        ConfigError: The cluster cannot be reached, or lacks the device.
    """
    with connect(config.address) as cluster:
        return _device(config, cluster)


def _device(config: RunConfig, cluster: Cluster) -> str:
    """What torch calls the device, in an actor: Ray shows each actor its own GPU alone."""
    if config.device == "auto":
        return "cuda" if cluster.gpus else "cpu"
    if config.device.startswith("cuda:"):
        raise ConfigError(
            f"Device {config.device}: Ray chooses the GPUs. Use device cuda, and the variable "
            "CUDA_VISIBLE_DEVICES to leave some out."
        )
    if config.device == "cuda" and not cluster.gpus:
        raise ConfigError("Device cuda was asked for, but Ray has no GPUs: use device cpu.")
    return config.device


@dataclass(frozen=True)
class _Resources:
    """How many actors, what Ray reserves for each, and the CPU threads of its model."""

    workers: int
    shape: ActorShape
    threads: int


def _resources(config: RunConfig, cluster: Cluster, *, on_gpu: bool) -> _Resources:
    """One actor per GPU, or per `threads` CPU cores of a node.

    More `workers` than that share GPUs and cores, so that Ray can place all of them.
    """
    threads = config.threads or max(1, min(DEFAULT_CPU_THREADS, max(cluster.node_cpus)))
    if on_gpu:
        workers = config.workers or cluster.gpus
        share = _share(cluster.node_gpus, workers)
        return _Resources(workers, ActorShape(cpus=0, gpus=min(1, share)), threads)
    fitting = sum(cpus // threads for cpus in cluster.node_cpus)
    workers = config.workers or max(1, fitting)
    cpus = min(threads, _share(cluster.node_cpus, workers))
    return _Resources(workers, ActorShape(cpus=cpus, gpus=0), threads)


def _share(node_units: Sequence[int], workers: int) -> float:
    """The largest share, whole or 1 / n of a unit, that all workers can have at once."""
    for whole in range(max(node_units), 0, -1):
        if sum(units // whole for units in node_units) >= workers:
            return whole
    for parts in range(2, workers + 1):
        if parts * sum(node_units) >= workers:
            return int(10_000 / parts) / 10_000  # Ray counts in ten-thousandths
    return 0
