"""examples/train_dit.py as a Ray Train job, with DistributedDataParallel.

    ray job submit --working-dir . --runtime-env jobs/runtime_env.yaml -- \\
        python jobs/train_dit.py --processes 8 --store /data/latents --folder /data/dit

The other options are those of the example. The store and the folder must be visible to every node.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from latentmill.engine.cluster import connect
from latentmill.errors import LatentmillError
from latentmill.storage.job_folder import refuse_job_folder
from latentmill.training.job import cause, check_workers
from latentmill.training.settings import absolute

EXAMPLES = Path(__file__).parents[1] / "examples"


def train(config: dict[str, Any]) -> None:
    """What each process runs; the first one writes samples and results."""
    import ray.train
    from ray.train.torch import prepare_model

    import latentmill as lm

    sys.path.insert(0, config["examples"])
    import train_dit

    args = train_dit.arguments(config["options"])
    store = lm.open(args.store)
    trained = train_dit.train(store, args, wrap=prepare_model)
    if ray.train.get_context().get_world_rank() == 0:
        train_dit.write_results(trained, store, args)
    ray.train.report({"loss": trained[1]["loss_after"]})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, add_help=False)
    parser.add_argument("--processes", type=int, default=1)
    own, options = parser.parse_known_args()
    if {"-h", "--help"} & set(options):
        parser.print_help()  # the example's options follow
    sys.path.insert(0, str(EXAMPLES))
    import train_dit

    args = train_dit.arguments(options)
    try:
        run(args, options, own.processes)
    except LatentmillError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


def run(args: argparse.Namespace, options: list[str], processes: int) -> None:
    from ray.train import RunConfig, ScalingConfig, TrainingFailedError
    from ray.train.torch import TorchTrainer

    import train_dit

    refuse_job_folder("--folder", str(args.folder))
    if args.model.startswith("trained:"):  # is recorded in the store
        args.model = "trained:" + absolute(args.model.removeprefix("trained:"))
    train_dit.encoded(args)  # encodes a source first
    # Ray Train gives its processes another working directory.
    folder = absolute(str(args.folder))
    options += ["--store", absolute(args.store), "--folder", folder]
    with connect(None) as cluster:
        on_gpu = bool(cluster.gpus)
        check_workers("--processes", processes, cluster, on_gpu=on_gpu)
        trainer = TorchTrainer(
            train,
            train_loop_config={"options": options, "examples": str(EXAMPLES)},
            scaling_config=ScalingConfig(num_workers=processes, use_gpu=on_gpu),
            run_config=RunConfig(name="ray", storage_path=folder),
        )
        try:
            trainer.fit()
        except TrainingFailedError as error:
            raise cause(error) from error


if __name__ == "__main__":
    main()
