"""Measures how much more memory a run on a two-hour file needs than one on a two-minute file.

    python benchmarks/memory.py [--hours 2]

Both runs are the real command in its own process. The memory of the whole process tree (driver, Ray
and workers) is sampled as proportional set size, so that shared pages count once. The two-minute
run fills the batches, so it shows what the model and Ray need by themselves.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from common import machine, random_linear_cae, write_result

RATE = 44100
SAMPLE_SECONDS = 0.2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hours", type=float, default=2.0)
    arguments = parser.parse_args()
    result: dict[str, Any] = {"script": "benchmarks/memory.py", "hours": arguments.hours}
    with random_linear_cae("tiny"), tempfile.TemporaryDirectory() as folder:
        print(machine(), flush=True)
        for name, seconds in (("long", arguments.hours * 3600), ("short", 120.0)):
            write_noise(Path(folder) / name / "noise.wav", seconds)
        result["wav_bytes"] = (Path(folder) / "long" / "noise.wav").stat().st_size
        for model, store in (("lin-cae", "parquet"), ("mdct", "webdataset"), ("mdct", "parquet")):
            peaks = {
                name: peak_memory(Path(folder) / name, Path(folder) / "out", model, store)
                for name in ("short", "long")
            }
            result[f"{model} {store}"] = {
                "short_mib": round(peaks["short"] / 2**20),
                "long_mib": round(peaks["long"] / 2**20),
                "above_mib": round((peaks["long"] - peaks["short"]) / 2**20),
            }
            print(model, store, result[f"{model} {store}"], flush=True)
    result["weights"] = "lin-cae with random weights, its architecture with few channels"
    write_result("memory", result)


def write_noise(path: Path, seconds: float) -> None:
    """Write a stereo 16-bit WAV of noise, minute by minute."""
    import numpy as np
    import soundfile

    path.parent.mkdir()
    random = np.random.default_rng(0)
    with soundfile.SoundFile(path, "w", RATE, 2, "PCM_16") as file:
        left = round(seconds * RATE)
        while left > 0:
            size = min(left, 60 * RATE)
            file.write((random.standard_normal((size, 2)) * 0.1).astype(np.float32))
            left -= size


def peak_memory(source: Path, out: Path, model: str, store: str) -> int:
    """Run `latentmill encode`; returns the peak memory of its process tree in bytes."""
    command = [Path(sys.executable).with_name("latentmill"), "encode", source, out]
    process = subprocess.Popen(
        [*command, "--model", model, "--format", store],
        stdout=subprocess.DEVNULL,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )
    peak = 0
    while process.poll() is None:
        peak = max(peak, sum(pss(pid) for pid in tree(process.pid)))
        time.sleep(SAMPLE_SECONDS)
    if process.returncode:
        raise SystemExit(f"encode ended with {process.returncode}")
    shutil.rmtree(out)
    return peak


def tree(root: int) -> list[int]:
    """Return a process and all of its descendants."""
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        children.setdefault(int(fields[1]), []).append(int(stat.parent.name))
    found, queue = [], [root]
    while queue:
        pid = queue.pop()
        found.append(pid)
        queue += children.get(pid, [])
    return found


def pss(pid: int) -> int:
    """Return the proportional set size of a process in bytes; 0 if it has ended."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:")), 0)


if __name__ == "__main__":
    main()
