"""Sorts the rows of a plan with the library's own sorter and with DuckDB, in turns.

    python benchmarks/sorting.py [--items 1000000] [--rounds 3]

Each sort has a process of its own, which receives the rows of draft tables in random order, sorts
them by block and key on the disk, reads them in order and checks that no key is there twice. DuckDB
may use 256 MiB and two threads.
"""

from __future__ import annotations

import argparse
import itertools
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa

from common import RESULTS, cpu_seconds, median, write_result
from latentmill.plan.items import DRAFT_SCHEMA, draft_table
from latentmill.plan.sort import Sorter
from latentmill.sources.base import Item

ROWS = 20_000  # of each table that the source gives


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--items", type=int, default=1_000_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--one", choices=("sorter", "duckdb"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(measure(arguments.one, arguments.items)))
        return
    rounds: dict[str, list[dict[str, float]]] = {"sorter": [], "duckdb": []}
    for _ in range(arguments.rounds):
        for name, found in rounds.items():
            command = [sys.executable, __file__, "--one", name, "--items", str(arguments.items)]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            found.append(json.loads(done.stdout))
    result: dict[str, object] = {"items": arguments.items, "rounds": arguments.rounds}
    for name, found in rounds.items():
        result[name] = {key: median([one[key] for one in found]) for key in found[0]}
    write_result("sorting", result, arguments.results)


def measure(name: str, items: int) -> dict[str, float]:
    given = list(tables(items))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start, cpu = time.perf_counter(), cpu_seconds()
    with tempfile.TemporaryDirectory() as folder:
        found = by_sorter(given, folder) if name == "sorter" else by_duckdb(given, folder)
        count, last = 0, ""
        for table in found:
            keys = table["key"].to_pylist()
            assert last < keys[0] and all(a < b for a, b in itertools.pairwise(keys))
            count, last = count + len(keys), keys[-1]
    assert count == items
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        "seconds": time.perf_counter() - start,
        "cpu_seconds": cpu_seconds() - cpu,
        "mib": (after - before) / 1024,
    }


def tables(items: int) -> Iterator[pa.Table]:
    order = np.random.default_rng(0).permutation(items)
    for start in range(0, items, ROWS):
        yield draft_table(
            [
                Item(
                    f"artist{n % 5000:04d}/album{n % 97:02d}/track {n:08d}",
                    f"s3://bucket/music/artist{n % 5000:04d}/album{n % 97:02d}/track {n:08d}.flac",
                    4_000_000 + n,
                    f"etag-{n:032x}",
                    seconds=180.0 + n % 120,
                    metadata=json.dumps({"title": f"Track {n}", "genre": "electronic"}),
                )
                for n in order[start : start + ROWS].tolist()
            ]
        )


def by_sorter(given: list[pa.Table], folder: str) -> Iterator[pa.Table]:
    sorter = Sorter(Path(folder, "sorting"), ("block", "key"))
    for table in given:
        sorter.push(table)
    yield from sorter.tables()


def by_duckdb(given: list[pa.Table], folder: str) -> Iterator[pa.Table]:
    import duckdb

    with duckdb.connect(f"{folder}/plan.duckdb") as db:
        db.execute("set memory_limit = '256MiB'; set threads = 2")
        db.execute(f"set temp_directory = '{folder}/spilled'")
        for number, table in enumerate(given):
            db.register("part", table)
            create = "create table items as" if number == 0 else "insert into items"
            db.execute(f"{create} select * from part")
            db.unregister("part")
        names = ", ".join(f'"{name}"' for name in DRAFT_SCHEMA.names)
        found = db.sql(f"select {names} from items order by block, key")
        for batch in found.to_arrow_reader(ROWS):
            yield pa.Table.from_batches([batch])


if __name__ == "__main__":
    main()
