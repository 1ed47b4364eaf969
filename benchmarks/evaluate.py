"""Measures time and memory of `latentmill evaluate --only statistics` for a large store.

    python benchmarks/evaluate.py [--records 1000000] [--frames 64] [--folder DIR]

A store of synthetic records is written with the library's own writers: latents of 64 channels,
float16, smooth in time, in ten clusters. One record in a thousand is a copy of another with noise
of 1 %, which must be found. The statistics are measured in a process of their own; its peak memory
is that of the whole process, of which Python, torch and Arrow are about 300 MiB. `load` is the
system's load average before and after: if it is above the number of cores, other processes made the
elapsed time longer.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

import synthetic
from common import RESULTS, write_result
from latentmill.record import Record
from latentmill.sources.base import Item
from synthetic import COPIES, HOP, copied, model_document, record

CHANNELS, PER_UNIT = 64, 4000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--records", type=int, default=1_000_000)
    parser.add_argument("--frames", type=int, default=64)
    parser.add_argument(
        "--folder", type=Path, help="keep the store in it, or measure the one that is there"
    )
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--one", help=argparse.SUPPRESS)  # a store, in a process
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(measure(arguments.one)))
        return
    load = [os.getloadavg()[0]]
    with tempfile.TemporaryDirectory() as temporary:
        store = f"{arguments.folder or temporary}/store"
        if not Path(store).exists():
            write_store(store, arguments.records, arguments.frames)
        command = [sys.executable, __file__, "--one", store]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
    result = json.loads(done.stdout)
    load = [round(one, 1) for one in (*load, os.getloadavg()[0])]
    facts: dict[str, Any] = {
        "load": load,
        "records": arguments.records,
        "frames": arguments.frames,
        "channels": CHANNELS,
    }
    facts |= {"planted": arguments.records // COPIES}
    write_result("evaluate", {**facts, **result}, arguments.results)


def measure(store: str) -> dict[str, Any]:
    from latentmill.evaluation.statistics import measure_statistics
    from latentmill.store.store import open_store

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start, cpu = time.perf_counter(), time.process_time()
    found = measure_statistics(open_store(store), items=1)
    return {
        "seconds": round(time.perf_counter() - start, 1),
        "cpu_seconds": round(time.process_time() - cpu, 1),
        "rss_before_mib": before // 1024,
        "peak_rss_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        "near_duplicates": len(found.near_duplicates),
        "outliers": len(found.outliers),
    }


def write_store(url: str, records: int, frames: int) -> None:
    """Ten clusters; of each thousand records, the last is almost a copy of the first."""

    def made(item: Item) -> Record:
        number = int(item.key)
        like = copied(number)
        random = np.random.default_rng(like)
        cluster = np.random.default_rng(like % 10).standard_normal((CHANNELS, 1))
        steps = random.standard_normal((CHANNELS, frames), np.float32)
        latent = np.cumsum(steps, axis=1) / 4 + cluster
        if like != number:
            latent *= 1 + 0.01 * np.random.default_rng(number).standard_normal(latent.shape)
        return record(item, number, latent.astype(np.float16), samples=frames * HOP)

    keys = (f"{n:08d}" for n in range(records))
    synthetic.write_store(url, keys, made, model_document(CHANNELS), per_unit=PER_UNIT)


if __name__ == "__main__":
    main()
