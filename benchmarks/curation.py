"""Measures `select`, `split` and `merge` on a large store, and training on a view of it.

    python benchmarks/curation.py [--records 1000000] [--folder DIR]

The store is that of benchmarks/evaluate.py: synthetic records of 64 channels. Each command runs in
a process of its own, whose peak memory is reported; `merge` joins two views of half the records
each. Then random crops are streamed from the store and from a view of all its records in turns; the
ratio is that of the medians.
"""

from __future__ import annotations

import argparse
import itertools
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from common import RESULTS, write_result
from evaluate import write_store

COMMANDS = ("select", "split", "halves", "merge")
CROP, BATCH, BATCHES, ROUNDS, WARM = 32, 64, 400, 8, 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--records", type=int, default=1_000_000)
    parser.add_argument("--frames", type=int, default=64)
    parser.add_argument(
        "--folder", type=Path, help="keep the store in it, or measure the one that is there"
    )
    parser.add_argument("--only", nargs="*", choices=(*COMMANDS, "stream"))
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)  # in a process
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(measure(*arguments.one)))
        return
    with tempfile.TemporaryDirectory() as temporary:
        store = f"{arguments.folder or temporary}/store"
        if not Path(store).exists():
            write_store(store, arguments.records, arguments.frames)
        result: dict[str, Any] = {"records": arguments.records}
        for name in arguments.only or (*COMMANDS, "stream"):
            command = [sys.executable, __file__, "--one", name, store, f"{temporary}/{name}"]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            result[name] = json.loads(done.stdout)
    result.pop("halves", None)  # only the input of `merge`
    write_result("curation", result, arguments.results)


def measure(name: str, store: str, out: str) -> dict[str, Any]:
    import latentmill as lm

    start, cpu = time.perf_counter(), time.process_time()
    if name == "stream":
        return stream(store, out)
    if name == "select":
        middle = lm.open(store).index.key(len(lm.open(store)) // 2)
        made = lm.select(store, out, where=f"key >= '{middle}' and duration > 1")
        chosen = made.records
    elif name == "merge":
        halves = Path(out).parent / "halves"
        chosen = lm.merge([halves / "a", halves / "b"], out).records
    else:
        into = {"train": 0.9, "valid": 0.05, "test": 0.05}
        parts = lm.split(store, out, into if name == "split" else {"a": 0.5, "b": 0.5})
        chosen = sum(part.store.records for part in parts if part.store is not None)
    return {
        "chosen": chosen,
        "seconds": round(time.perf_counter() - start, 1),
        "cpu_seconds": round(time.process_time() - cpu, 1),
        "peak_rss_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
    }


def stream(store: str, out: str) -> dict[str, Any]:
    """CPU seconds for the same number of batches of crops, from a store and a view of it."""
    import torch

    import latentmill as lm

    torch.set_num_threads(1)  # threads that wait for a busy core would be most of the time
    lm.select(store, out)
    seconds: dict[str, list[float]] = {store: [], out: []}
    streams = {url: lm.LatentStream(url, crop=CROP, batch_size=BATCH) for url in seconds}
    in_turns = [*streams, *reversed(streams)]  # so that neither always follows the other
    for url in in_turns * ((ROUNDS + WARM) // 2):
        cpu = time.process_time()
        for _ in itertools.islice(iter(streams[url]), BATCHES * BATCH):
            pass
        seconds[url].append(time.process_time() - cpu)
    of_store, of_view = (statistics.median(some[WARM:]) for some in seconds.values())
    return {
        "crops_per_cpu_second": round(BATCHES * BATCH / of_view),
        "view_to_store": round(of_store / of_view, 3),
    }


if __name__ == "__main__":
    main()
