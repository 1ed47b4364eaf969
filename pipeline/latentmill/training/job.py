"""Runs training as a Ray Train job: one process on a laptop, several with DDP on a cluster."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from latentmill.engine.lock import Membership, only_run
from latentmill.errors import ConfigError, LatentmillError, TrainingError
from latentmill.storage.storage import Storage
from latentmill.text.log import get_logger
from latentmill.text.printing import counted
from latentmill.training.loop import Trainer, TrainProcess
from latentmill.training.settings import TrainSettings

if TYPE_CHECKING:
    from latentmill.engine.cluster import Cluster

_log = get_logger("training")


def run(settings: TrainSettings) -> None:
    """Train with Ray Train; a run that was interrupted is resumed.

    Raises:
        StoreError: Another run is alive in the same folder.
        ConfigError: This machine cannot run as many processes.
        LatentmillError: The first error of a process, such as a loss that is not finite.
    """
    from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
    from ray.train.torch import TorchTrainer

    from latentmill.engine.cluster import connect

    out = str(Path(settings.out).absolute())
    with only_run(Storage(out)), connect(settings.address) as cluster:
        if settings.device == "cuda" and not cluster.gpus:
            raise ConfigError("device is cuda, but the cluster has no GPU: use auto or cpu.")
        on_gpu = bool(cluster.gpus) and settings.device != "cpu"
        check_workers("workers", settings.workers, cluster, on_gpu=on_gpu)
        trainer = TorchTrainer(
            _train,
            train_loop_config={"settings": settings.model_dump(mode="json")},
            scaling_config=ScalingConfig(num_workers=settings.workers, use_gpu=on_gpu),
            run_config=RunConfig(
                name="ray",
                storage_path=out,
                failure_config=FailureConfig(max_failures=settings.max_failures),
            ),
        )
        try:
            trainer.fit()
        except TrainingFailedError as error:
            raise cause(error) from error


def _train(config: dict[str, Any]) -> None:
    """What each process runs."""
    import ray.train
    from ray.train.torch import get_device, prepare_model

    context = ray.train.get_context()
    place = TrainProcess(
        rank=context.get_world_rank(),
        device=get_device(),
        wrap=lambda network: prepare_model(network, move_to_device=False),
        report=ray.train.report,
    )
    settings = TrainSettings.model_validate(config["settings"])
    with contextlib.closing(Membership(Storage(settings.out))):
        Trainer(settings, place).train()


def check_workers(setting: str, workers: int, cluster: Cluster, *, on_gpu: bool) -> None:
    """Compare the number of processes with the GPUs or cores; Ray Train waits for them forever.

    `setting` is the name of the number, for messages. Raises ConfigError if Ray is started on this
    machine, and logs a warning for a cluster, which may get more nodes.
    """
    units = cluster.gpus if on_gpu else sum(cluster.node_cpus)
    if workers <= units:
        return
    number = counted(units, "GPU" if on_gpu else "CPU core")
    if cluster.embedded:
        raise ConfigError(
            f"{setting} is {workers}, but this machine has only {number}: use at most {units}."
        )
    _log.warning(
        "%s is %d, but the cluster has only %s now: training starts when it has %d.",
        setting,
        workers,
        number,
        workers,
    )


def cause(error: Exception) -> LatentmillError:
    """The first LatentmillError of a process; else a TrainingError with Ray's message."""
    failures: dict[int, Exception] = getattr(error, "worker_failures", {})
    for _, failure in sorted(failures.items()):
        causes: list[BaseException | None] = [failure, getattr(failure, "cause", None)]
        causes += [failure.__cause__]
        for cause in causes:
            if isinstance(cause, LatentmillError):
                return cause
    text = next((str(failure) for failure in failures.values()), str(error))
    return TrainingError(f"training failed: {text.strip().splitlines()[-1]}")
