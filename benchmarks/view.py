"""Measures `latentmill view` and the metadata file for a large store.

    python benchmarks/view.py [--records 1000000] [--folder DIR]

A store of synthetic records, which have metadata of their own, is written with the library's own
writers. Sealing it (index and metadata file) and the server each run in a process of their own;
their peak memory is that of the whole process, which includes Python, torch and Arrow. The shards
have row groups of 1,000 records, not 16, because a million records are then written in minutes;
sealing reads the usual row groups more slowly. Searches are requests over HTTP: each is asked once,
so nothing is in the server's cache of results.
"""

from __future__ import annotations

import argparse
import json
import re
import resource
import subprocess
import sys
import tempfile
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from common import RESULTS, write_result
from latentmill.encoding.fingerprint import fingerprint
from latentmill.plan import Plan, UnitLimits, draft, freeze, load, read_items
from latentmill.record import Outcome, Record
from latentmill.sources.base import Item
from latentmill.storage.storage import Storage
from latentmill.store import parquet
from latentmill.store.commit import write_commit, write_unit
from latentmill.store.seal import seal, write_origin

RATE, HOP, CHANNELS, FRAMES, PER_UNIT = 44100, 4096, 4, 4, 4000
GENRES = ("jazz", "rock", "techno", "folk", "ambient", "classical", "hip hop", "metal")
SEARCHES: dict[str, dict[str, Any]] = {
    "first page": {},
    "last page": {"offset": -50},
    "part of a key": {"key": "0012345"},
    "pattern": {"key": "*/0*77"},
    "text": {"where": [{"field": "metadata_genre", "op": "is", "value": "jazz"}]},
    "range": {"where": [{"field": "metadata_bpm", "op": "min", "value": 175}]},
    "three conditions": {
        "key": "7",
        "where": [
            {"field": "metadata_genre", "op": "contains", "value": "o"},
            {"field": "loudness", "op": "max", "value": -20},
        ],
    },
    "sorted": {"sort": "metadata_bpm", "descending": 1},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--records", type=int, default=1_000_000)
    parser.add_argument("--folder", type=Path, help="where the store is written, then removed")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--seal", help=argparse.SUPPRESS)  # a store, in a process
    arguments = parser.parse_args()
    if arguments.seal:
        print(json.dumps(sealing(arguments.seal)))
        return
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        store = f"{folder}/store"
        start = time.perf_counter()
        write_store(store, arguments.records)
        result: dict[str, Any] = {"writing_seconds": round(time.perf_counter() - start, 1)}
        command = [sys.executable, __file__, "--seal", store]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        result |= json.loads(done.stdout)
        (file,) = Path(store).glob("metadata.*")
        result |= {"metadata_mib": round(file.stat().st_size / 2**20, 1)}
        result |= viewing(store)
    write_result("view", {"records": arguments.records, **result}, arguments.results)


def sealing(url: str) -> dict[str, Any]:
    storage = Storage(url)
    plan = load(storage)
    assert plan is not None
    start = time.perf_counter()
    seal(storage, plan)
    return {
        "seal_seconds": round(time.perf_counter() - start, 1),
        "seal_peak_rss_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
    }


def viewing(store: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "latentmill", "view", store, "--no-browser", "--json"]
    start = time.perf_counter()
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        url = json.loads(server.stdout.readline())["url"]
        facts = get(f"{url}api/store")
        result: dict[str, Any] = {"ready_seconds": round(time.perf_counter() - start, 2)}
        status = Path(f"/proc/{server.pid}/status")
        result["rss_at_start_mib"] = peak_mib(status)
        result["searches"] = {
            name: search(url, facts["records"], values) for name, values in SEARCHES.items()
        }
        result["peak_rss_mib"] = peak_mib(status)
    finally:
        server.terminate()
        server.wait()
    return result


def search(url: str, records: int, values: dict[str, Any]) -> dict[str, Any]:
    values = dict(values)
    if values.get("offset", 0) < 0:
        values["offset"] += records
    texts = {name: v if isinstance(v, str) else json.dumps(v) for name, v in values.items()}
    start = time.perf_counter()
    found = get(f"{url}api/search?{urllib.parse.urlencode(texts)}")
    return {"seconds": round(time.perf_counter() - start, 3), "found": found["total"]}


def get(url: str) -> Any:
    with urllib.request.urlopen(url, timeout=600) as answer:
        return json.loads(answer.read())


def peak_mib(status: Path) -> int | None:
    if not status.exists():  # not Linux
        return None
    found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text())
    return None if found is None else int(found[1]) // 1024


def write_store(url: str, records: int) -> None:
    """A store without its seal."""
    parquet.ROW_GROUP_ITEMS = 1000
    model = {"name": "synthetic", "sample_rate": RATE, "channels": 1, "latent_channels": CHANNELS}
    document = {
        "model": {**model, "hop": HOP, "scale_factor": 1.0},
        "chunking": {"stitch": "trim", "samples": 16 * HOP, "step": 8 * HOP, "overlap": 8},
        "settings": {"dtype": "float16"},
    }
    items = (
        Item(f"{n % 1000:03d}/{n:08d}", f"/music/{n:08d}.wav", 1, "1", seconds=1.0)
        for n in range(records)
    )
    storage = Storage(url)
    plan = Plan("/music", document, "synthetic", {}, "parquet", {})
    with draft(items, UnitLimits(unit_seconds=PER_UNIT)) as drafted:
        plan = freeze(plan, drafted, storage)
    write_origin(storage, np.zeros((CHANNELS, 16), np.float32))
    for unit in plan.units:
        commit = write_unit(
            storage,
            unit.name,
            outcomes(read_items(storage, unit)),
            format_name="parquet",
            fingerprint=fingerprint(document),
            info={"model": document["model"], "dtype": "float16"},
        )
        write_commit(storage, commit, {"total_seconds": 1.0})


def outcomes(items: Any) -> Iterator[Outcome]:
    latent = np.ones((CHANNELS, FRAMES), np.float16)
    for item in items:
        number = int(item.key[-8:])
        record = Record(
            key=item.key,
            latent=latent,
            num_samples=FRAMES * HOP,
            sample_rate=RATE,
            source_uri=item.uri,
            source_sample_rate=RATE,
            source_channels=2,
            content_hash=f"xxh3:{number * 2654435761 % 2**64:032x}",
            rms=0.01 + number % 977 * 4e-4,
            peak=0.5,
            levels=bytes([200]) * FRAMES,
            metadata={
                "title": f"Song number {number} of {GENRES[number % 8]}",
                "genre": GENRES[number % 8],
                "bpm": 60 + number % 120 + 0.5,
                "year": 1950 + number % 75,
            },
        )
        yield Outcome(item.key, "encoded", record=record)


if __name__ == "__main__":
    main()
