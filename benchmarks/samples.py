"""Compares the cost of samples with that of reading their crops, in this process.

    python benchmarks/samples.py
    python benchmarks/samples.py --items 1000 --rounds 400

A batch of 32 random crops of 256 frames of a local store in the page cache is read in several ways,
in turns, so that a slow phase of the machine affects all. Medians of microseconds for a batch:

- crops: `CropReader.read_block`, the crops alone.
- samples: `LatentDataset.__getitems__` without the items' own metadata.
- samples and metadata: the same with it; it is parsed when it is first read.
- samples, metadata read: the same, and `metadata` of each sample is read.
- batch: `collate` of these samples, in addition.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from common import RESULTS, ROOT, median, write_result
from reader import make_latents
from reader_contenders import BATCH, CHANNELS, CROP, shard_items

sys.path.insert(0, str(ROOT / "tests"))


def ways(folder: str, items: int) -> dict[str, Callable[[], Any]]:
    """The ways to read a batch; each call reads other items."""
    import latentmill as lm

    plain = lm.LatentDataset(folder, crop=CROP, metadata=False)
    described = lm.LatentDataset(folder, crop=CROP)
    for dataset in (plain, described):
        dataset.set_epoch(0)
    source = plain.corpus.stores[0]
    random = np.random.default_rng(0)

    def numbers() -> list[int]:
        return random.integers(0, items, BATCH).tolist()

    def crops() -> Any:
        chosen = np.array(numbers())
        rows, starts = source.locate(chosen, 0, chosen)
        return source.crops.read_block(rows, starts, CROP)

    return {
        "crops": crops,
        "samples": lambda: plain.__getitems__(numbers()),
        "samples and metadata": lambda: described.__getitems__(numbers()),
        "samples, metadata read": lambda: [
            one.metadata for one in described.__getitems__(numbers())
        ],
        "batch": lambda: lm.collate(described.__getitems__(numbers())),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--items", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=400)
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    from support.latent_store import write_latents

    latents = make_latents(options.items)
    with tempfile.TemporaryDirectory() as folder:
        write_latents(
            folder,
            [len(latent) for latent in latents],
            channels=CHANNELS,
            per_unit=shard_items(latents),
            latents=[latent.T for latent in latents],
            metadata=[
                {"title": f"Song {n}", "tags": ["jazz", "trio"], "bpm": 90.5 + n, "year": 1999}
                for n in range(options.items)
            ],
        )
        found = ways(folder, options.items)
        taken: dict[str, list[float]] = {name: [] for name in found}
        for _ in range(options.rounds):
            for name, way in found.items():
                began = time.perf_counter()
                way()
                taken[name].append(1e6 * (time.perf_counter() - began))
    medians = {name: median(times) for name, times in taken.items()}
    result = {
        "items": options.items,
        "rounds": options.rounds,
        "load": [round(load, 1) for load in os.getloadavg()],
        "microseconds": medians,
        "over_crops": {name: round(one / medians["crops"], 2) for name, one in medians.items()},
    }
    write_result("samples", result, options.results)


if __name__ == "__main__":
    main()
