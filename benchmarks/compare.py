"""Compares this checkout with another one, such as that of the commit before a large change.

    git worktree add /tmp/before COMMIT
    python benchmarks/compare.py /tmp/before [--rounds 5] [--items 250000] [--copies 6]

Three commands alternate between the two checkouts, each in a process of its own with the packages
of this Python: `plan` of a Parquet manifest, `encode` of music with mdct through Ray, and a script
that reads random crops of the encoded store with `LatentDataset`, in batches of 32. Medians of
elapsed time and of CPU time (without that of Ray's workers) are reported; `ratio` is this checkout
over the other, so a value below 1 is faster. Starting Python and Ray is included; the bytecode of
both is cached, as that of an installed package is.
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import RESULTS, ROOT, SHARED_AUDIO, median, write_result
from pipeline import pick
from planning import write_manifest

READ = """
import sys
import numpy as np
import latentmill as lm
dataset = lm.LatentDataset(sys.argv[1], crop=256)
random = np.random.default_rng(0)
for _ in range(int(sys.argv[2])):
    dataset.__getitems__(random.integers(0, len(dataset), 32).tolist())
"""
BATCHES = 2000


@dataclass(frozen=True)
class Cost:
    """What a command took, in seconds."""

    elapsed: float
    cpu: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("other", type=Path, help="folder of the other checkout")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--items", type=int, default=250_000, help="rows of the manifest")
    parser.add_argument("--copies", type=int, default=6, help="copies of the music")
    parser.add_argument("--source", type=Path, default=SHARED_AUDIO / "ogg")
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    commit = ["git", "-C", str(arguments.other), "rev-parse", "--short", "HEAD"]
    other = subprocess.run(commit, check=True, capture_output=True, text=True).stdout.strip()
    checkouts = {"this": ROOT, "other": arguments.other.resolve()}
    costs: dict[tuple[str, str], list[Cost]] = {}
    load = [os.getloadavg()[0]]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        manifest = write_manifest(folder / "manifest.parquet", arguments.items)
        music = pick(arguments.source, folder / "music", float("inf"), arguments.copies)
        for turn in range(arguments.rounds):
            for which, checkout in sorted(checkouts.items(), reverse=turn % 2 == 1):
                store = str(folder / f"{which}{turn}")
                commands = {
                    "plan": latentmill(checkout, "plan", str(manifest), f"{store}-plan"),
                    "encode": latentmill(checkout, "encode", str(music), store, "--model", "mdct"),
                    "read": [sys.executable, "-c", READ, store, str(BATCHES)],
                }
                for name, command in commands.items():
                    costs.setdefault((name, which), []).append(run(command, checkout))
                    print(turn, which, name, costs[name, which][-1], flush=True)
    load.append(os.getloadavg()[0])
    result: dict[str, Any] = {"other": other, "rounds": arguments.rounds, "load": load}
    for name in ("plan", "encode", "read"):
        result[name] = compared(costs[name, "this"], costs[name, "other"])
    write_result("compare", result, arguments.results)


def latentmill(checkout: Path, *arguments: str) -> list[str]:
    """The command line of a checkout, by the entry point that its pyproject.toml declares."""
    scripts = tomllib.loads((checkout / "pyproject.toml").read_text())["project"]["scripts"]
    module, _, function = scripts["latentmill"].partition(":")
    code = f"import sys; from {module} import {function}; sys.exit({function}())"
    return [sys.executable, "-c", code, *arguments]


def run(command: list[str], checkout: Path) -> Cost:
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    environment = {**os.environ, "PYTHONPATH": str(checkout / "pipeline")}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{command} in {checkout} failed:\n{done.stderr}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Cost(time.perf_counter() - start, cpu)


def compared(this: list[Cost], other: list[Cost]) -> dict[str, float]:
    """Medians of seconds, and the medians of the ratios of each round."""
    pairs = list(zip(this, other, strict=True))
    return {
        "seconds": median([cost.elapsed for cost in this]),
        "other_seconds": median([cost.elapsed for cost in other]),
        "ratio": median([a.elapsed / b.elapsed for a, b in pairs]),
        "cpu_seconds": median([cost.cpu for cost in this]),
        "other_cpu_seconds": median([cost.cpu for cost in other]),
        "cpu_ratio": median([a.cpu / b.cpu for a, b in pairs]),
    }


if __name__ == "__main__":
    main()
