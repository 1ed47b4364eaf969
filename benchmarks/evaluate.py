"""Measures time and memory of `latentmill evaluate --only statistics` for a large store.

    python benchmarks/evaluate.py [--records 1000000] [--frames 64] [--folder DIR]

A store of synthetic records is written with the library's own writers: latents of 64 channels,
float16, smooth in time, in ten clusters. One record in a thousand is a copy of another with noise
of 1 %, which must be found. The statistics are measured in a process of their own; its peak memory
is that of the whole process, of which Python, torch and Arrow are about 300 MiB.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from common import RESULTS, write_result
from latentmill.encoding.fingerprint import fingerprint
from latentmill.plan import Plan, UnitLimits, draft, freeze, read_items
from latentmill.record import Outcome, Record
from latentmill.sources.base import Item
from latentmill.storage.storage import Storage
from latentmill.store.commit import write_commit, write_unit
from latentmill.store.seal import seal, write_origin

RATE, HOP, CHANNELS, PER_UNIT, COPIES = 44100, 4096, 64, 4000, 1000


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
    with tempfile.TemporaryDirectory() as temporary:
        store = f"{arguments.folder or temporary}/store"
        if not Path(store).exists():
            write_store(store, arguments.records, arguments.frames)
        command = [sys.executable, __file__, "--one", store]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
    result = json.loads(done.stdout)
    facts = {"records": arguments.records, "frames": arguments.frames, "channels": CHANNELS}
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
    model = {"name": "synthetic", "sample_rate": RATE, "channels": 1, "latent_channels": CHANNELS}
    document = {
        "model": {**model, "hop": HOP, "scale_factor": 1.0},
        "chunking": {"stitch": "trim", "samples": 16 * HOP, "step": 8 * HOP, "overlap": 8},
        "settings": {"dtype": "float16"},
    }
    items = (Item(f"{n:08d}", f"/music/{n:08d}.wav", 1, "1", seconds=1.0) for n in range(records))
    storage = Storage(url)
    plan = Plan("/music", document, "synthetic", {}, "parquet", {})
    with draft(items, UnitLimits(unit_seconds=PER_UNIT)) as drafted:
        plan = freeze(plan, drafted, storage)
    write_origin(storage, np.zeros((CHANNELS, 16), np.float32))
    for unit in plan.units:
        commit = write_unit(
            storage,
            unit.name,
            outcomes(read_items(storage, unit), frames),
            format_name="parquet",
            fingerprint=fingerprint(document),
            info={"model": document["model"], "dtype": "float16"},
        )
        write_commit(storage, commit, {"total_seconds": 1.0})
    seal(storage, plan)


def outcomes(items: Any, frames: int) -> Iterator[Outcome]:
    """Ten clusters; of each thousand records, the last is almost a copy of the first."""
    for item in items:
        number = int(item.key)
        copied = number % COPIES == COPIES - 1
        made = number - COPIES + 1 if copied else number
        random = np.random.default_rng(made)
        cluster = np.random.default_rng(made % 10).standard_normal((CHANNELS, 1))
        steps = random.standard_normal((CHANNELS, frames), np.float32)
        latent = np.cumsum(steps, axis=1) / 4 + cluster
        if copied:
            latent *= 1 + 0.01 * np.random.default_rng(number).standard_normal(latent.shape)
        record = Record(
            key=item.key,
            latent=latent.astype(np.float16),
            num_samples=frames * HOP,
            sample_rate=RATE,
            source_uri=item.uri,
            source_sample_rate=RATE,
            source_channels=2,
            content_hash=f"xxh3:{number:032x}",
            rms=0.05 + number * 4e-7,
            peak=0.5,
            levels=bytes([200]) * frames,
        )
        yield Outcome(item.key, "encoded", record=record)


if __name__ == "__main__":
    main()
