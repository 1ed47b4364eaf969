"""Measures time and memory of `latentmill plan` for large Parquet manifests.

    python benchmarks/planning.py [--items 1000000 2000000]

Each plan is made in its own process, with the steps of the command except calibration: read the
manifest, sort, split into units, save the plan. Rows are in random order, each with a path, a
duration, a title and an artist. `--grouped` puts each twelve rows into a group, which needs another
sort to check for equal keys. If the recorded load average is above 1, the plan ran beside other
load: use its CPU seconds, which other load affects less than wall time.
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

from common import RESULTS, write_result

ROWS = 100_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--items", type=int, nargs="+", default=[250_000, 1_000_000, 2_000_000])
    parser.add_argument(
        "--grouped", action="store_true", help="also plan the first size with groups"
    )
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--one", type=Path, help=argparse.SUPPRESS)  # a manifest, in a process
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(plan(arguments.one, grouped=arguments.grouped)))
        return
    cases = [(items, False) for items in arguments.items]
    if arguments.grouped:
        cases.append((arguments.items[0], True))
    results = []
    for items, grouped in cases:
        with tempfile.TemporaryDirectory() as folder:
            manifest = write_manifest(Path(folder) / "manifest.parquet", items)
            command = [sys.executable, __file__, "--one", str(manifest)]
            done = subprocess.run(
                [*command, *(["--grouped"] if grouped else [])],
                check=True,
                capture_output=True,
                text=True,
            )
        results.append({"items": items, "grouped": grouped, **json.loads(done.stdout)})
    write_result("planning", {"plans": results}, arguments.results)


def write_manifest(path: Path, items: int) -> Path:
    """Write a manifest of `items` rows in random order."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq

    random = np.random.default_rng(0)
    numbers = random.permutation(items)
    schema = pa.schema(
        [
            ("path", pa.string()),
            ("duration", pa.float64()),
            ("title", pa.string()),
            ("artist", pa.string()),
            ("album", pa.string()),
        ]
    )
    with pq.ParquetWriter(path, schema, compression="zstd") as writer:
        for start in range(0, items, ROWS):
            some = numbers[start : start + ROWS].tolist()
            columns = {
                "path": [f"s3://music/album {n // 12:07d}/track {n:08d}.flac" for n in some],
                "duration": random.uniform(30, 400, len(some)),
                "title": [f"The track of number {n}" for n in some],
                "artist": [f"Artist {n // 120}" for n in some],
                "album": [f"album {n // 12:07d}" for n in some],
            }
            writer.write_table(pa.table(columns, schema))
    return path


def plan(manifest: Path, *, grouped: bool) -> dict[str, Any]:
    """Plan a manifest into a new store beside the manifest."""
    from latentmill.config import load_config
    from latentmill.plan import load, read_items
    from latentmill.run.forecast import forecast
    from latentmill.storage.storage import Storage

    options = {"source": str(manifest), "out": str(manifest.parent / "store"), "device": "cpu"}
    if grouped:
        options["group_by"] = "metadata:album,title"
    before = _rss()
    began, cpu = time.perf_counter(), time.process_time()
    value = forecast(load_config(None, options), calibrated=False)
    seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
    peak = _rss()
    began = time.perf_counter()
    storage = Storage(value.store)
    frozen = load(storage)
    assert frozen is not None
    loaded = time.perf_counter() - began
    began = time.perf_counter()
    assert len(read_items(storage, frozen.units[-1])) == frozen.units[-1].items
    return {
        "seconds": round(seconds, 2),
        "cpu_seconds": round(cpu, 2),
        "load_average": round(os.getloadavg()[0], 1),
        "peak_rss_mib": round(peak),
        "rss_before_mib": round(before),
        "units": value.units,
        "hours": round(value.hours),
        "plan_mb": round(sum(storage.list("plan").values()) / 1e6, 1),
        "load_seconds": round(loaded, 3),
        "read_unit_seconds": round(time.perf_counter() - began, 4),
    }


def _rss() -> float:
    """Return the peak memory of this process in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    main()
