"""Compares the pipeline's throughput with the model's and with the linear-cae README's loop.

    python benchmarks/pipeline.py [--seconds 60] [--rounds 3] [--source FOLDER]
    python benchmarks/pipeline.py --clips 4000

Three measurements alternate in one process tree. `pipeline` encodes a folder through Ray, including
loading, stitching and committing shards. `model` runs the same batches with the audio already in
memory, in an actor with the pipeline's threads and memory. `loop` follows the README of linear-cae,
file by file. Starting Ray and loading the model are not counted. `model_busy_share` is measured in
the pipeline's run: the share of the time in which its model was working. `--clips` measures only
stereo clips of 5 s with a mono model that costs nothing (`simulated_gpu.py`, batches of 32 chunks),
in a worker of its own process, from planning to commits, and writes `clips.json`. Units have half
an hour as in a corpus of 128 hours: by default those of so few clips would have a minute.
`soundfile.read` of the same files in two threads is measured in the same run, alternately.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common import SHARED_AUDIO, machine, median, random_linear_cae, write_result
from latentmill.models.inference.device import worker_environment

if TYPE_CHECKING:
    import numpy as np

    from latentmill.plan import UnitLimits

CLIP_SECONDS = 5.0
CLIPS_UNIT_SECONDS = 1800
CLIPS_MODEL = "python:simulated_gpu:build"
README_CHUNK = 44100 * 10
README_OVERLAP = 0.25
README_BATCH = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--source", type=Path, default=SHARED_AUDIO / "ogg")
    parser.add_argument(
        "--seconds", type=float, default=90, help="seconds of audio per round for lin-cae"
    )
    parser.add_argument("--copies", type=int, default=6, help="copies of the folder for mdct")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--clips", type=int, default=0, help="measure only this number of clips")
    parser.add_argument("--size", choices=("full", "tiny"), default="full")
    arguments = parser.parse_args()
    if not arguments.source.is_dir():
        parser.error(f"{arguments.source} is missing: set --source to a folder of audio")
    if arguments.clips:
        if missing := worker_environment():  # memory is allocated as in a worker
            os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **missing})
        with tempfile.TemporaryDirectory() as folder:
            clips_alone(Path(folder), arguments.clips, arguments.rounds)
        return
    result: dict[str, Any] = {"script": "benchmarks/pipeline.py", "rounds": arguments.rounds}
    with random_linear_cae(arguments.size), tempfile.TemporaryDirectory() as folder:
        import ray

        ray.init("local", include_dashboard=False, logging_level="ERROR", log_to_driver=False)
        few = pick(arguments.source, Path(folder) / "few", arguments.seconds, 1)
        many = pick(arguments.source, Path(folder) / "many", float("inf"), arguments.copies)
        print(machine(), flush=True)
        for model, corpus in (("mdct", many), ("lin-cae", few)):
            result[model] = measure(model, corpus, Path(folder), arguments.rounds)
            print(model, result[model], flush=True)
    result["weights"] = f"lin-cae with random weights, {arguments.size} architecture"
    write_result("pipeline", result)


def clips_alone(folder: Path, clips: int, rounds: int) -> None:
    """Measure clips a second through a worker, and those that two threads read with soundfile."""
    import feed
    from latentmill.plan import UnitLimits

    source = SHARED_AUDIO / "flac"
    audio = feed.music(source if source.is_dir() else None)
    result: dict[str, Any] = {"script": f"benchmarks/pipeline.py --clips {clips}"}
    for suffix in feed.FORMATS:
        corpus = folder / suffix
        write_clips(corpus, audio, suffix, clips)
        bench = Bench(CLIPS_MODEL, corpus, {"hop": 4096}, 32, UnitLimits(CLIPS_UNIT_SECONDS))
        bench.run_here(folder / "out")  # imports, and the page cache
        pairs = [
            (
                feed.timed(lambda: bench.run_here(folder / "out")),  # noqa: B023  called at once
                feed.timed(lambda: read_alone(corpus)),  # noqa: B023
            )
            for _ in range(rounds)
        ]
        result[suffix] = {
            "clips_per_second": median([clips / one.seconds for one, _ in pairs]),
            "clips_per_cpu_second": median([clips / one.cpu for one, _ in pairs]),
            "soundfile_per_second": median([clips / other.seconds for _, other in pairs]),
            "soundfile_per_cpu_second": median([clips / other.cpu for _, other in pairs]),
            "of_soundfile_alone": median([other.seconds / one.seconds for one, other in pairs]),
            "by_cpu": median([other.cpu / one.cpu for one, other in pairs]),
        }
        print(suffix, result[suffix], flush=True)
        shutil.rmtree(corpus)
    write_result("clips", result | {"load": os.getloadavg(), "nice": os.nice(0)})


def write_clips(folder: Path, audio: np.ndarray, suffix: str, clips: int) -> None:
    """Write files that are in the page cache: 100 different ones, because MP3 is slow to write."""
    import feed

    feed.write(folder, audio, suffix, CLIP_SECONDS, min(clips, 100))
    different = sorted(folder.iterdir())
    for number in range(len(different), clips):
        shutil.copy(different[number % len(different)], folder / f"{number:06}.{suffix}")
    os.sync()  # else the first shards would wait for these files to be on the disk


def read_alone(folder: Path) -> None:
    import soundfile

    def read(path: Path) -> None:
        soundfile.read(path, dtype="float32", always_2d=True)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(read, sorted(folder.iterdir())))


def pick(source: Path, target: Path, seconds: float, copies: int) -> Path:
    """Copy files of a folder until they have the given number of seconds."""
    import soundfile

    target.mkdir()
    total = 0.0
    for copy in range(copies):
        for path in sorted(source.glob("*.ogg")) or sorted(source.rglob("*.*")):
            length = soundfile.info(path).duration
            if total + length <= seconds:
                total += length
                shutil.copy(path, target / f"{copy}-{path.name}")
    return target


def measure(model: str, corpus: Path, folder: Path, rounds: int) -> dict[str, Any]:
    """Alternate pipeline, model and loop; returns medians, and ratios of pairs."""
    import ray

    from latentmill.engine.actor import UNITS_IN_FLIGHT
    from latentmill.models.inference.device import KEEP_FREED_MEMORY

    bench = Bench(model, corpus)
    # As many threads as the pipeline's actor; by default, an actor has only its main thread.
    options = {"num_cpus": 0, "max_concurrency": UNITS_IN_FLIGHT + 1}
    options["runtime_env"] = {"env_vars": KEEP_FREED_MEMORY}
    alone = ray.remote(**options)(ModelAlone).remote(bench.job, bench.items)
    seconds = ray.get(alone.prepare.remote())
    loop = model == "lin-cae"
    times: dict[str, list[float]] = {"pipeline": [], "model": [], "loop": []}
    for turn in range(rounds):
        times["model"].append(ray.get(alone.run.remote()))
        times["pipeline"].append(bench.run(folder / f"{model}-{turn}"))
        if loop:
            times["loop"].append(readme_loop(corpus, folder / "loop", bench.job.threads))
        print(model, {name: round(v[-1], 2) for name, v in times.items() if v}, flush=True)
    ray.kill(alone)
    pairs = zip(times["model"], times["pipeline"], strict=True)
    result: dict[str, Any] = {
        "audio_seconds": round(seconds, 1),
        "pipeline_x_real_time": median([seconds / t for t in times["pipeline"]]),
        "model_x_real_time": median([seconds / t for t in times["model"]]),
        "pipeline_over_model": median([m / p for m, p in pairs]),
        "model_busy_share": median(bench.busy),
        "seconds": {name: [round(t, 3) for t in v] for name, v in times.items() if v},
    }
    if loop:
        pairs = zip(times["loop"], times["pipeline"], strict=True)
        result["readme_loop_x_real_time"] = median([seconds / t for t in times["loop"]])
        result["pipeline_over_readme_loop"] = median([other / p for other, p in pairs])
    return result


class Bench:
    """A run of the pipeline, timed from when the workers have loaded the model."""

    def __init__(
        self,
        model: str,
        corpus: Path,
        options: dict[str, Any] | None = None,
        batch_size: int | None = None,
        limits: UnitLimits | None = None,
    ) -> None:
        from latentmill.config import fingerprint_document, load_config
        from latentmill.encoding.chunks import Chunking
        from latentmill.engine.job import make_job
        from latentmill.models import registry
        from latentmill.plan import Plan, UnitLimits, read_items
        from latentmill.sources.folder import FolderSource
        from latentmill.storage.storage import Storage

        config = load_config(
            None,
            {"source": str(corpus), "out": "unused", "model": model, "batch_size": batch_size},
        )
        handle = registry.resolve(model, options)
        chunking = Chunking.for_model(handle.spec)
        self.source = FolderSource(str(corpus), config.extensions)
        self.limits = limits or UnitLimits()
        self.plan = Plan(
            source=str(corpus),
            fingerprint=fingerprint_document(config, handle.spec, chunking),
            model=model,
            model_options={},
            format=config.format,
            ignored={},
        )
        self.busy: list[float] = []  # share of each run in which the model worked
        self.job = make_job(config, handle, chunking, self.plan, device="cpu", threads=2)
        with tempfile.TemporaryDirectory() as folder:
            plan = self.freeze(Path(folder))
            self.items = [read_items(Storage(folder), unit) for unit in plan.units]

    def freeze(self, out: Path) -> Any:
        from latentmill.plan import draft, freeze
        from latentmill.storage.storage import Storage

        with draft(self.source.items(), self.limits) as items:
            return freeze(self.plan, items, Storage(str(out)))

    def run_here(self, out: Path) -> None:
        """Plan, and encode the units with a worker of this process, two at a time as an actor."""
        from latentmill.engine.actor import UNITS_IN_FLIGHT
        from latentmill.engine.worker import Worker

        units = self.freeze(out).units
        with (
            contextlib.closing(Worker(replace(self.job, store=str(out)))) as worker,
            ThreadPoolExecutor(UNITS_IN_FLIGHT) as pool,
        ):
            list(pool.map(worker.encode, units))
        shutil.rmtree(out)

    def run(self, out: Path) -> float:
        from latentmill.engine.actor import ActorShape
        from latentmill.engine.progress import Progress
        from latentmill.engine.scheduler import Scheduler
        from latentmill.engine.worker import UnitResult

        marks, busy = [], []

        class Marks(Progress):
            def unit_done(self, result: UnitResult) -> None:
                marks.append(time.perf_counter())
                busy.append(result.timings["model_seconds"])

        units = self.freeze(out).units
        job = replace(self.job, store=str(out))
        scheduler = Scheduler(job, ActorShape(cpus=0, gpus=0), lambda: 1, Marks())
        scheduler.run(units, lambda origin: marks.append(time.perf_counter()))
        assert len(marks) == len(units) + 1
        shutil.rmtree(out)
        seconds = marks[-1] - marks[0]
        self.busy.append(sum(busy) / seconds)
        return seconds


class ModelAlone:
    """A Ray actor that runs the model on the pipeline's batches, with the audio in memory."""

    def __init__(self, job: Any, units: Any) -> None:
        self._job, self._units = job, units  # the items of each unit

    def prepare(self) -> float:
        """Load all audio and form batches; returns the seconds of audio."""
        import torch

        from latentmill.encoding.batches import Packer
        from latentmill.encoding.chunks import Chunk
        from latentmill.encoding.loading import Loading
        from latentmill.encoding.timings import Timings
        from latentmill.encoding.unit_audio import LocalAudio

        torch.set_num_threads(self._job.threads)
        self._model = self._job.model.load("cpu")
        spec, chunking, settings = self._model.spec, self._job.chunking, self._job.settings
        self._batches, seconds = [], 0.0
        for unit in self._units:
            packer = Packer(chunking, settings.batch_size)
            stream = LocalAudio(unit, Loading(spec, chunking, settings), Timings())
            with contextlib.closing(stream):
                for index, _, event in stream:
                    if isinstance(event, Chunk):
                        self._batches += packer.add(index, event)
                    elif hasattr(event, "num_samples"):
                        seconds += event.num_samples / spec.sample_rate
            self._batches += packer.flush()
        self._batches = [torch.from_numpy(batch.audio()) for batch in self._batches]
        self._model.encode(self._batches[0])
        return seconds

    def run(self) -> float:
        began = time.perf_counter()
        for batch in self._batches:
            self._model.encode(batch)
        return time.perf_counter() - began


def readme_loop(corpus: Path, out: Path, threads: int) -> float:
    """Encode file by file as in the package's README: load, downmix to mono, encode, save."""
    import numpy as np
    import soundfile
    import soxr
    import torch
    from linear_cae import Autoencoder

    torch.set_num_threads(threads)
    model = Autoencoder.from_pretrained(
        "lin-cae",
        max_chunk_size=README_CHUNK,
        overlap_percentage=README_OVERLAP,
        max_batch_size=README_BATCH,
    )
    out.mkdir(exist_ok=True)
    began = time.perf_counter()
    # The README does not use inference mode; without it, this loop needs tens of GiB.
    with torch.inference_mode():
        for path in sorted(corpus.iterdir()):
            audio, rate = soundfile.read(path, dtype="float32", always_2d=True)
            mono = soxr.resample(audio.mean(axis=1), rate, 44100)
            latent = model.encode(torch.from_numpy(mono)[None])
            np.save(out / f"{path.stem}.npy", latent.numpy())
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
