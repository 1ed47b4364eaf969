"""From a configuration to running actors: connect to Ray, choose devices, schedule the units."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

from latentmill.config import RunConfig
from latentmill.encoding.chunks import Chunking
from latentmill.engine.actor import ActorShape
from latentmill.engine.careful import HANG_SECONDS
from latentmill.engine.cluster import Cluster, connect, describe, head_answers
from latentmill.engine.job import DECODE_THREADS, make_job
from latentmill.engine.lock import Hold
from latentmill.engine.scheduler import Scheduler, Watcher
from latentmill.errors import ConfigError, HeadGoneError
from latentmill.models.base import ModelHandle
from latentmill.plan import Plan, Unit
from latentmill.storage.storage import Storage
from latentmill.store.schema import ORIGIN_PATH
from latentmill.store.seal import write_origin

DEFAULT_CPU_THREADS = 4
MOST_DECODE_THREADS = 16
HEAD_SECONDS = 40.0  # without an answer


def encode_units(
    config: RunConfig,
    handle: ModelHandle,
    chunking: Chunking,
    plan: Plan,
    todo: list[Unit],
    watcher: Watcher,
    hold: Hold,
) -> None:
    """Connect to Ray and run the units on as many actors as it has GPUs, or CPU cores for.

    Nodes that join later get actors too, unless the number of workers is set.

    Raises:
        LatentmillError: See `Scheduler.run` and `connect`.
    """
    storage = Storage(config.out)
    with connect(config.address, payloads=bool(config.decode_tasks)) as cluster:
        device = _device(config, cluster)
        resources = _resources(config, cluster, on_gpu=device == "cuda")
        if config.decode_tasks:
            _check_spare_cores(cluster, resources, config.workers)
        if config.decode_threads is None:
            threads = _decode_threads(cluster, resources.shape)
            config = config.model_copy(update={"decode_threads": threads})
        job = make_job(config, handle, chunking, plan, device=device, threads=resources.threads)
        stall_seconds = config.stall_minutes * 60
        # A decoder on trial is given up before its whole worker would be.
        hang_seconds = min(HANG_SECONDS, stall_seconds / 3)
        job = replace(job, owner=hold.owner, hang_seconds=hang_seconds)
        write = partial(write_origin, hold.storage)
        has_origin = storage.exists(ORIGIN_PATH)
        scheduler = Scheduler(
            job,
            resources.shape,
            _Room(resources.shape, config.workers),
            watcher,
            check=hold.check,
            stall_seconds=stall_seconds,
        )
        scheduler.run(todo, (lambda _: None) if has_origin else write)


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
            f"--device {config.device}: Ray chooses the GPUs. Use --device cuda, and the variable "
            "CUDA_VISIBLE_DEVICES to leave some out."
        )
    if config.device == "cuda" and not cluster.gpus and (cluster.embedded or not config.workers):
        raise ConfigError(
            "--device cuda was asked for, but Ray has no GPUs: use --device cpu, or --workers on a "
            "cluster that adds GPU nodes when they are asked for."
        )
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
        share = _share(cluster.node_gpus, workers) or 1  # none yet: an autoscaler adds them
        return _Resources(workers, ActorShape(cpus=0, gpus=min(1, share)), threads)
    fitting = sum(cpus // threads for cpus in cluster.node_cpus)
    workers = config.workers or max(1, fitting)
    cpus = min(threads, _share(cluster.node_cpus, workers))
    return _Resources(workers, ActorShape(cpus=cpus, gpus=0), threads)


def _decode_threads(cluster: Cluster, shape: ActorShape) -> int:
    """The cores of a GPU's node for each of its workers; beside a model on the CPU, a few."""
    nodes = zip(cluster.node_cpus, cluster.node_gpus, strict=True)
    shares = [cpus * shape.gpus / gpus for cpus, gpus in nodes if gpus]
    return max(DECODE_THREADS, min(MOST_DECODE_THREADS, int(min(shares, default=0))))


def _check_spare_cores(cluster: Cluster, resources: _Resources, workers: int | None) -> None:
    """Refuse decode tasks that would wait for a core for ever, if no node may be added."""
    cores = sum(cluster.node_cpus)
    if (cluster.embedded or not workers) and cores - resources.workers * resources.shape.cpus < 1:
        raise ConfigError(
            f"--decode-tasks needs CPU cores besides those of the workers, which use all {cores}: "
            "lower --workers or --threads, or leave --decode-tasks out."
        )


class _Room:
    """How many actors there should be: as many as were asked for, or as the nodes have room for.

    Asked again and again, it notices nodes that join or leave, and a head that is gone: Ray ends
    a process that is without one for a minute, so the run ends in order before.
    """

    def __init__(self, shape: ActorShape, workers: int | None) -> None:
        self._shape = shape
        self._workers = workers
        self._answer = workers or 1
        self._heard = time.monotonic()

    def __call__(self) -> int:
        if head_answers():
            self._heard = time.monotonic()
            self._answer = self._workers or self._fitting()
        elif time.monotonic() - self._heard > HEAD_SECONDS:
            raise HeadGoneError(
                "The head of the Ray cluster is gone: start the cluster again, then the same "
                "command resumes."
            )
        return self._answer

    def _fitting(self) -> int:
        """One actor at least, for a first node that an autoscaler may add."""
        cluster, shape = describe(), self._shape
        nodes, share = cluster.node_cpus, shape.cpus
        if shape.gpus:
            nodes, share = cluster.node_gpus, shape.gpus
        return max(1, sum(int(units / share) for units in nodes) if share else 1)


def _share(node_units: Sequence[int], workers: int) -> float:
    """The largest share, whole or 1 / n of a unit, that all workers can have at once."""
    for whole in range(max(node_units), 0, -1):
        if sum(units // whole for units in node_units) >= workers:
            return whole
    for parts in range(2, workers + 1):
        if parts * sum(node_units) >= workers:
            return int(10_000 / parts) / 10_000  # Ray counts in ten-thousandths
    return 0
