"""Connects to Ray, chooses devices and resources, and schedules the units of a run."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

from latentmill.config import DEFAULT_CPU_THREADS, RunConfig
from latentmill.encoding.chunks import Chunking
from latentmill.engine.actor import ActorShape
from latentmill.engine.cluster import Cluster, connect, describe, head_answers
from latentmill.engine.job import LOAD_THREADS, make_job
from latentmill.engine.joint import FieldInPass, joint_job, joint_units, write_origins
from latentmill.engine.lock import Hold
from latentmill.engine.scheduler import RunObserver, Scheduler
from latentmill.engine.trial_load import HANG_SECONDS
from latentmill.errors import ConfigError, HeadGoneError
from latentmill.models.base import ModelHandle
from latentmill.plan import Plan, Unit
from latentmill.storage.storage import Storage

MOST_LOAD_THREADS = 16
HEAD_SECONDS = 40.0  # without an answer


def encode_units(
    config: RunConfig,
    handle: ModelHandle,
    chunking: Chunking,
    plan: Plan,
    todo: list[Unit],
    observer: RunObserver,
    hold: Hold,
    fields: Sequence[FieldInPass] = (),
) -> None:
    """Connect to Ray and run the units on one actor per GPU, or on as many as the CPU cores allow.

    Nodes that join later get actors too, unless the number of workers is set. `fields` are computed
    in the same pass.
    """
    storage = Storage(config.out)
    with connect(config.address, payloads=bool(config.load_tasks)) as cluster:
        device = _device(config, cluster)
        resources = _resources(config, cluster, on_gpu=device == "cuda")
        if config.load_tasks:
            _check_spare_cores(cluster, resources, config.workers)
            _check_packing(plan, storage)
        if config.load_threads is None:
            threads = _load_threads(cluster, resources.shape)
            config = config.model_copy(update={"load_threads": threads})
        job = make_job(config, handle, chunking, plan, device=device, threads=resources.threads)
        stall_seconds = config.stall_minutes * 60
        # A trial load must time out before the scheduler replaces the whole worker.
        hang_seconds = min(HANG_SECONDS, stall_seconds / 3)
        job = replace(job, owner=hold.owner, hang_seconds=hang_seconds)
        scheduler = Scheduler(
            joint_job(job, fields) if fields else job,
            resources.shape,
            _ActorTarget(resources.shape, config.workers),
            observer,
            check=partial(_check_holds, [hold, *(one.hold for one in fields)]),
            stall_seconds=stall_seconds,
        )
        if fields:
            scheduler.run(joint_units(todo, fields), partial(write_origins, hold, fields))
        else:
            scheduler.run(todo, lambda origin: write_origins(hold, (), [origin]))


def _check_holds(holds: Sequence[Hold]) -> None:
    for hold in holds:
        hold.check()


def cluster_device(config: RunConfig) -> str:
    """The device that the workers will use on this cluster: `cpu` or `cuda`."""
    with connect(config.address) as cluster:
        return _device(config, cluster)


def _device(config: RunConfig, cluster: Cluster) -> str:
    """The torch device of an actor. It has no index, because an actor sees only its own GPU."""
    if config.device == "auto":
        return "cuda" if cluster.gpus else "cpu"
    if config.device.startswith("cuda:"):
        raise ConfigError(
            f"--device {config.device} is not supported, because Ray chooses the GPUs: use "
            "--device cuda, and set CUDA_VISIBLE_DEVICES to use only some of them."
        )
    if config.device == "cuda" and not cluster.gpus and (cluster.embedded or not config.workers):
        raise ConfigError(
            "--device cuda is not available, because Ray has no GPUs: use --device cpu, or set "
            "--workers if an autoscaler adds GPU nodes on demand."
        )
    return config.device


@dataclass(frozen=True)
class _Resources:
    """The number of actors, what Ray reserves for each, and the CPU threads of each model."""

    workers: int
    shape: ActorShape
    threads: int


def _resources(config: RunConfig, cluster: Cluster, *, on_gpu: bool) -> _Resources:
    """One actor per GPU, or per `threads` CPU cores of a node.

    If `workers` is larger, they share GPUs and cores, so that Ray can place all of them.
    """
    # No cores yet: an autoscaler adds the nodes.
    threads = config.cpu_threads(max(cluster.node_cpus) or DEFAULT_CPU_THREADS)
    if on_gpu:
        workers = config.workers or cluster.gpus
        share = _share(cluster.node_gpus, workers) or 1  # no GPUs yet: an autoscaler adds them
        return _Resources(workers, ActorShape(cpus=0, gpus=min(1, share)), threads)
    fitting = sum(cpus // threads for cpus in cluster.node_cpus)
    workers = config.workers or max(1, fitting)
    cpus = min(threads, _share(cluster.node_cpus, workers) or threads)
    return _Resources(workers, ActorShape(cpus=cpus, gpus=0), threads)


def _load_threads(cluster: Cluster, shape: ActorShape) -> int:
    """Load threads per worker: its share of a GPU node's cores, or a few if the model is on CPU."""
    nodes = zip(cluster.node_cpus, cluster.node_gpus, strict=True)
    shares = [cpus * shape.gpus / gpus for cpus, gpus in nodes if gpus]
    return max(LOAD_THREADS, min(MOST_LOAD_THREADS, int(min(shares, default=0))))


def _check_spare_cores(cluster: Cluster, resources: _Resources, workers: int | None) -> None:
    """Refuse load tasks if the workers use all cores and no node can be added."""
    cores = sum(cluster.node_cpus)
    if (cluster.embedded or not workers) and cores - resources.workers * resources.shape.cpus < 1:
        raise ConfigError(
            f"--load-tasks needs free CPU cores, but the workers use all {cores}: lower --workers "
            "or --threads, or remove --load-tasks."
        )


def _check_packing(plan: Plan, storage: Storage) -> None:
    if plan.packing == 1:
        raise ConfigError(
            f"Store {storage.root} was planned by an earlier version of latentmill, which loaded "
            "items in another order, and load tasks cannot do that: remove --load-tasks."
        )


class _ActorTarget:
    """The number of actors to run: the configured number, or as many as fit on the nodes.

    It is called every few seconds, so it follows nodes that join or leave. It raises HeadGoneError
    if the head is gone: Ray kills the driver a minute after losing the head, so the run has to
    end before that.
    """

    def __init__(self, shape: ActorShape, workers: int | None) -> None:
        self._shape = shape
        self._workers = workers
        self._count = workers or 1
        self._last_answer = time.monotonic()  # of the head

    def __call__(self) -> int:
        if head_answers():
            self._last_answer = time.monotonic()
            self._count = self._workers or self._fitting()
        elif time.monotonic() - self._last_answer > HEAD_SECONDS:
            raise HeadGoneError(
                "The head of the Ray cluster is gone: start the cluster again, then run the same "
                "command to resume."
            )
        return self._count

    def _fitting(self) -> int:
        """At least one actor, because an autoscaler may add a first node for it."""
        cluster, shape = describe(), self._shape
        nodes, share = cluster.node_cpus, shape.cpus
        if shape.gpus:
            nodes, share = cluster.node_gpus, shape.gpus
        return max(1, sum(int(units / share) for units in nodes) if share else 1)


def _share(node_units: Sequence[int], workers: int) -> float:
    """The largest share of a CPU or GPU, a whole number or 1 / n, that every worker can have."""
    for whole in range(max(node_units), 0, -1):
        if sum(units // whole for units in node_units) >= workers:
            return whole
    for parts in range(2, workers + 1):
        if parts * sum(node_units) >= workers:
            return int(10_000 / parts) / 10_000  # the precision of Ray's resources
    return 0
