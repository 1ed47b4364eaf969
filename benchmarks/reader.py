"""Compares latentmill's reader with other ways to store and read latents.

    python benchmarks/reader.py
    python benchmarks/reader.py --items 20000 --rounds 9 --only latentmill litdata

Every contender stores the same random latents `[64, frames]`, float16, with the lengths of songs at
10.8 frames a second, and returns float32 tensors. Each runs in its own process. Rounds alternate
between the contenders, so that a slow phase of the machine affects all. Medians are reported, and
random crops are compared with the originals.

- crops_per_second: batches of 32 crops of 256 frames at random places of random items.
- sequential_mb_per_second: all items whole, in stored order (MB of float16).
- crops_per_cpu_second, sequential_mb_per_cpu_second: the same per CPU second of the process, which
  is more reliable than wall time if other programs are running.
- first_sample_ms: from opening to the first crop, without imports.
- loader_crops_per_second: one shuffled epoch with 2 persistent workers: a DataLoader, or the
  library's own loader for `latentmill Loader` and `litdata StreamingDataLoader`; also per CPU
  second of all its processes.
- memory_mb: growth of the process's peak resident size during crops and a sequential pass
  (including the pages of memory-mapped files that were read).

The peers' requirements conflict with the versions pinned here, so use a separate environment:
    pip install -e . litdata mosaicml-streaming pylance 'datasets<4'
A contender that is not installed is skipped and reported as missing.
"""

from __future__ import annotations

import argparse
import gc
import multiprocessing
import os
import resource
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch

from common import RESULTS, cpu_seconds, median, write_result
from reader_contenders import BATCH, CHANNELS, CONTENDERS, CROP, Contender, Latent

PACKAGES = {
    "litdata": "litdata",
    "litdata StreamingDataLoader": "litdata",
    "mosaicml-streaming": "mosaicml-streaming",
    "webdataset": "webdataset",
    "datasets": "datasets",
    "lance": "pylance",
}
WORKERS = 2


def make_latents(items: int) -> list[Latent]:
    """Make latents of songs of half a minute to ten minutes, most of about three."""
    random = np.random.default_rng(0)
    frames = np.clip(random.lognormal(np.log(1900), 0.45, items), 300, 6400).astype(int)
    pool = random.standard_normal((8000, CHANNELS)).astype(np.float16)
    latents = []
    for number, length in enumerate(frames.tolist()):
        latent = pool[number % 1500 : number % 1500 + length].copy()
        latent[:, 0] = np.arange(length) % 2048  # the frame's number
        latent[:, 1] = number % 2048  # the item's number
        latents.append(latent)
    return latents


def peak_rss_mb() -> float:
    """Return the peak resident size since the last reset."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


class Measure:
    """The measurements of one contender, in its process."""

    def __init__(self, name: str, folder: Path, seconds: float) -> None:
        self.new: Callable[[], Contender] = CONTENDERS[name]
        self.folder, self.seconds = folder, seconds
        self.random = np.random.default_rng(1)
        self.contender = self.new()
        self.contender.open(folder)
        self.frames = np.load(folder.parent / "frames.npy")
        self._draw_and_read()
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak
        self.before = peak_rss_mb()
        self.loader: Any = None

    def _draw_and_read(self) -> tuple[np.ndarray, np.ndarray, torch.Tensor]:
        items = self.random.integers(0, len(self.frames), BATCH)
        starts = (self.random.random(BATCH) * (self.frames[items] - CROP + 1)).astype(np.int64)
        return items, starts, self.contender.crops(items.tolist(), starts.tolist())

    def check(self) -> bool:
        """Check that the crops are the requested ones (WebDataset chooses its own)."""
        items, starts, crops = self._draw_and_read()
        crops = crops.reshape(BATCH, CROP, CHANNELS)
        steps = (crops[:, 1:, 0] - crops[:, :-1, 0]) % 2048 == 1
        mine = (crops[:, 0, 0].numpy() == starts % 2048) & (crops[:, 0, 1].numpy() == items % 2048)
        return bool(steps.all()) and bool(
            mine.all() or type(self.contender).__name__ == "WebDataset"
        )

    def crops_per_second(self) -> tuple[float, float]:
        end = time.perf_counter() + self.seconds
        count, begin, cpu = 0, time.perf_counter(), time.process_time()
        while time.perf_counter() < end:
            self._draw_and_read()
            count += BATCH
        return count / (time.perf_counter() - begin), count / (time.process_time() - cpu)

    def sequential_mb_per_second(self) -> tuple[float, float]:
        begin, cpu, numbers = time.perf_counter(), time.process_time(), 0
        for latent in self.contender.sequential():
            numbers += latent.numel()
        assert numbers == int(self.frames.sum()) * CHANNELS
        size = numbers * 2 / 1e6
        return size / (time.perf_counter() - begin), size / (time.process_time() - cpu)

    def first_sample_ms(self) -> float:
        item = int(self.random.integers(0, len(self.frames)))
        gc.collect()
        begin = time.perf_counter()
        fresh = self.new()
        fresh.open(self.folder)
        fresh.crops([item], [7])
        return (time.perf_counter() - begin) * 1000

    def memory_mb(self) -> float:
        return peak_rss_mb() - self.before

    def loader_crops_per_second(self) -> tuple[float, float]:
        if self.loader is None:
            self.loader = self.contender.loader(WORKERS)
            list(self.loader)
        begin, cpu, count = time.perf_counter(), cpu_seconds(), 0
        while not count or time.perf_counter() - begin < self.seconds:
            for batch in self.loader:
                latents = batch["latents"] if isinstance(batch, dict) else batch
                count += len(latents)
        assert count % len(self.frames) == 0
        return count / (time.perf_counter() - begin), count / (cpu_seconds() - cpu)


def serve(name: str, folder: Path, seconds: float, pipe: Connection) -> None:
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
    measure = Measure(name, folder, seconds)
    pipe.send(measure.check())
    while True:  # until it is killed: threads of some peers would keep the process alive
        pipe.send(getattr(measure, pipe.recv())())


def installed(name: str) -> str | None:
    try:
        return version(PACKAGES[name]) if name in PACKAGES else version("latentmill")
    except PackageNotFoundError:
        return None


def in_turns(pipes: dict[str, Connection], rounds: int) -> dict[str, dict[str, list[float]]]:
    """Run every measurement of every contender, round by round."""
    names = list(pipes)
    found: dict[str, dict[str, list[float]]] = {name: {} for name in names}
    asked = ("crops_per_second", "sequential_mb_per_second", "first_sample_ms", "memory_mb")
    for what in (*asked, "loader_crops_per_second"):
        for turn in range(1 if what == "memory_mb" else rounds):
            for name in [*names[turn % len(names) :], *names[: turn % len(names)]]:
                pipes[name].send(what)
                got = pipes[name].recv()
                values = got if isinstance(got, tuple) else (got,)
                measures = (what, what.replace("_second", "_cpu_second"))
                for measure, value in zip(measures, values, strict=False):
                    found[name].setdefault(measure, []).append(value)
    return found


def measure_all(names: Sequence[str], folder: Path, rounds: int, seconds: float) -> dict[str, Any]:
    context = multiprocessing.get_context("spawn")
    pipes = {}
    try:
        for name in names:
            here, there = context.Pipe()
            process = context.Process(target=serve, args=(name, folder / name, seconds, there))
            process.start()
            there.close()
            pipes[name] = (here, process)
            assert here.recv(), f"{name} returns crops other than the requested ones"
        found = in_turns({name: pipe for name, (pipe, _) in pipes.items()}, rounds)
    finally:
        for _, process in pipes.values():
            process.kill()
            process.join()
    return {
        name: {what: median(values) for what, values in measures.items()}
        | {"runs": {what: [round(v, 1) for v in values] for what, values in measures.items()}}
        for name, measures in found.items()
    }


def verdict(found: dict[str, Any]) -> dict[str, Any]:
    """Check the goals: best at crops and first sample, within 10 % of the best sequential."""
    mine = found["latentmill"]
    peers = {name: one for name, one in found.items() if not name.startswith("latentmill")}
    if not peers:
        return {}
    best = {
        what: max(one[what] for one in peers.values())
        for what in (
            "crops_per_second",
            "sequential_mb_per_second",
            "sequential_mb_per_cpu_second",
            "loader_crops_per_second",
        )
    }
    return {
        "crops_over_best_peer": round(mine["crops_per_second"] / best["crops_per_second"], 2),
        "sequential_over_best_peer": round(
            mine["sequential_mb_per_second"] / best["sequential_mb_per_second"], 2
        ),
        "sequential_by_cpu_over_best_peer": round(
            mine["sequential_mb_per_cpu_second"] / best["sequential_mb_per_cpu_second"], 2
        ),
        "data_loader_over_best_peer": round(
            mine["loader_crops_per_second"] / best["loader_crops_per_second"], 2
        ),
        **{
            f"loader{'_by_cpu' * ('cpu' in what)}_over_{peer}": round(
                found["latentmill Loader"][what] / found[peer][what], 2
            )
            for what in ("loader_crops_per_second", "loader_crops_per_cpu_second")
            for peer in ("latentmill", "litdata", "litdata StreamingDataLoader")
            if "latentmill Loader" in found and peer in found
        },
        "first_sample_over_best_peer": round(
            min(one["first_sample_ms"] for one in peers.values()) / mine["first_sample_ms"], 2
        ),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--items", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument(
        "--seconds", type=float, default=1.0, help="seconds of random crops per round"
    )
    parser.add_argument("--only", nargs="+", choices=list(CONTENDERS), default=list(CONTENDERS))
    parser.add_argument("--folder", type=Path, help="folder for the data; default: a temporary one")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--name", default="reader", help="name of the file with the results")
    options = parser.parse_args()
    names = [name for name in options.only if installed(name)]
    folder = Path(tempfile.mkdtemp(dir=options.folder))
    try:
        latents = make_latents(options.items)
        np.save(folder / "frames.npy", np.array([len(latent) for latent in latents]))
        for name in names:
            print(f"writing {name}", flush=True)
            CONTENDERS[name]().build(folder / name, latents)
        size = sum(latent.nbytes for latent in latents) / 1e6
        del latents
        found = measure_all(names, folder, options.rounds, options.seconds)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    result = {
        "items": options.items,
        "megabytes": round(size),
        "rounds": options.rounds,
        "versions": {name: installed(name) for name in names},
        "not_installed": [name for name in options.only if name not in names],
        "load": [round(load, 1) for load in os.getloadavg()],
        "readers": found,
        "required": verdict(found) if "latentmill" in found else {},
    }
    write_result(options.name, result, options.results)


if __name__ == "__main__":
    main()
