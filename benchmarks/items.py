"""Measures what an item and a unit cost besides their latents: store bytes and driver memory.

    python benchmarks/items.py [--items 100 500] [--results FOLDER]

Encodes two corpora of tiny files with names of realistic length. The difference between the two is
what each additional item and unit adds to the store's files. The driver's memory is that of its
objects for one unit: the plan's unit, its state in the dispatcher, and its tally when it is done.
"""

from __future__ import annotations

import argparse
import json
import random
import string
import subprocess
import sys
import tempfile
import tracemalloc
from pathlib import Path

import numpy as np
import soundfile

from common import RESULTS, write_result

UNIT_SECONDS = 6.0  # about 50 items


def write_corpus(folder: Path, items: int) -> None:
    """Write files of different lengths, with random names because they compress like real ones."""
    chance = random.Random(0)
    noise = np.random.default_rng(0).uniform(-0.5, 0.5, 8000)

    def word() -> str:
        return "".join(chance.choices(string.ascii_lowercase, k=chance.randint(4, 9)))

    for number in range(items):
        if number % 12 == 0:
            album = folder / f"{word()} {word()}" / f"{word()} {word()}"
            album.mkdir(parents=True)
        name = f"{number % 12:02d} {word()} {word()} {word()}.wav"
        soundfile.write(album / name, noise[: chance.randint(2000, 8000)], 44100)


def measure(items: int, folder: Path) -> dict[str, int]:
    corpus, store = folder / f"corpus {items}", folder / f"store {items}"
    write_corpus(corpus, items)
    encode = ["encode", str(corpus), str(store), "--workers", "1", "--threads", "1"]
    encode += ["--unit-seconds", str(UNIT_SECONDS), "--device", "cpu"]
    subprocess.run([sys.executable, "-m", "latentmill", *encode], check=True)
    commits = [path.stat().st_size for path in (store / "commits").iterdir()]
    return {
        "items": items,
        "units": len(commits),
        "plan": sum(path.stat().st_size for path in (store / "plan").iterdir()),
        "commits": sum(commits),
        "index": (store / "index.arrow").stat().st_size,
        "dataset": (store / "dataset.json").stat().st_size,
    }


def statistics_bytes(store: Path) -> int:
    """Return the size of a commit without its items, mostly statistics of every channel."""
    document = json.loads((store / "commits" / "000000.json").read_text())
    whole = len(json.dumps(document, separators=(",", ":")))
    return whole - len(json.dumps(document["items"], separators=(",", ":")))


def driver_bytes_per_unit(units: int = 50_000) -> float:
    """Measure the driver's memory for one unit with tracemalloc."""
    from latentmill.engine.dispatch import Dispatch
    from latentmill.plan import Unit
    from latentmill.store.commit import Tally

    names = ("read", "decode", "wait", "model", "encode", "write", "total")
    tracemalloc.start()
    plan = tuple(Unit(n, 100, 1.0 + n, 1000 + n, f"{n:016x}") for n in range(units))
    dispatch = Dispatch(plan)
    tallies = {
        unit.name: Tally(
            100, 100, 0, 0, 1.0 + unit.number, 2000 + unit.number,
            {f"{name}_seconds": unit.number + 0.5 for name in names}, (), (),
        )
        for unit in plan
    }  # fmt: skip
    taken = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert dispatch.open == len(tallies) == units
    return round(taken / units, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--items", type=int, nargs=2, default=(100, 500))
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        few, many = (measure(items, Path(name)) for items in sorted(arguments.items))
        per_unit = statistics_bytes(Path(name) / f"store {many['items']}")
    items, units = many["items"] - few["items"], many["units"] - few["units"]
    result = {
        "script": "benchmarks/items.py",
        "model": "mdct, 512 channels",
        "bytes_per_item": {
            "plan": round((many["plan"] - few["plan"]) / items, 1),
            "commits": round((many["commits"] - few["commits"] - units * per_unit) / items, 1),
            "index": round((many["index"] - few["index"]) / items, 1),
        },
        "bytes_per_unit": {
            "commit": per_unit,
            "dataset": round((many["dataset"] - few["dataset"]) / units, 1),
            "driver_memory": driver_bytes_per_unit(),
        },
        "measured": [few, many],
    }
    write_result("items", result, arguments.results)


if __name__ == "__main__":
    main()
