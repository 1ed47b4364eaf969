"""What one of several processes under accelerate reads: run by test_accelerate.py."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration
from torch.utils.data import DataLoader

import latentmill as lm
from latentmill.errors import ConfigError

URL, NOTES, WORKERS, *UNEVEN = sys.argv[1:]
ALONE: dict[str, Any] = {"rank": 0, "world_size": 1}


def loader(kind: str, workers: int, url: str = URL, **ranks: Any) -> tuple[Any, DataLoader[Any]]:
    if kind == "batches":
        dataset = lm.LatentDataset(url, crop=8)
        sampler = lm.BatchSampler(dataset, 4, **ranks)
        return sampler, DataLoader(
            dataset, batch_sampler=sampler, num_workers=workers, collate_fn=lm.collate
        )
    stream = lm.LatentStream(url, crop=8, batch_size=4, **ranks)
    collate = lm.collate_tensors if kind == "dispatched" else lm.collate
    return stream, DataLoader(stream, batch_size=4, num_workers=workers, collate_fn=collate)


def main() -> None:
    found: dict[str, Any] = {}
    for name, dispatched in [("batches", None), ("sharded", False), ("dispatched", None)]:
        accelerator = Accelerator(
            cpu=True, dataloader_config=DataLoaderConfiguration(dispatch_batches=dispatched)
        )
        if name != "dispatched" or accelerator.is_main_process:  # the others only wait
            try:
                list(accelerator.prepare(loader(name, int(WORKERS))[1]))
            except ConfigError as error:
                found[f"{name}-error"] = str(error)
        accelerator.wait_for_everyone()
        reader, plain = loader(name, int(WORKERS), **ALONE)
        prepared = accelerator.prepare(plain)
        epochs, states = [], []
        for _ in range(2):
            batches = []
            for batch in prepared:
                batches.append([int(position) for position in batch["position"]])
                states.append(reader.state_after(batch))
            epochs.append(batches)
        found[name] = epochs
        # After the second step of the second epoch.
        state = states[len(epochs[0]) + 1]
        found[f"{name}-state"] = [state["epoch"], state["position"]]
        reader, plain = loader(name, int(WORKERS), **ALONE)
        resumed = accelerator.prepare(plain)
        reader.load_state_dict(state)
        resumed.set_epoch(state["epoch"])
        found[f"{name}-rest"] = [
            [int(position) for position in batch["position"]] for batch in resumed
        ]
        found[f"{name}-uneven"] = []
        for url in UNEVEN:
            reader, plain = loader(name, int(WORKERS), url, **ALONE)
            states = [reader.state_after(batch) for batch in accelerator.prepare(plain)]
            steps = [(state["epoch"], state["position"]) for state in states]
            found[f"{name}-uneven"].append(steps)
        accelerator.free_memory()
    rank = accelerator.process_index
    Path(NOTES, f"{rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
