"""Measures how the engine scales: with two nodes instead of one, and with faster models.

    python benchmarks/scaling.py [--seconds 20] [--source FOLDER]

`nodes`: a simulated GPU model (it sleeps a fixed time per batch) on one and on two real Ray nodes
of this machine. The efficiency is the throughput of two nodes divided by twice that of one,
measured from when all workers are ready. `pipeline`: real FLAC, MP3 and WAV through one worker
whose simulated model is 1,000, 5,000 and 10,000 times as fast as real time. The efficiency is that
model's time divided by the pipeline's. `decoding`: the number of CPU cores needed to load audio for
such a model, from the CPU time of loading alone, which a busy machine changes little.
`x_real_time_per_core` of a pipeline uses its CPU time, too.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

from common import ROOT, SHARED_AUDIO, write_result

sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "benchmarks")]

BATCH_SECONDS = 0.5
BATCH = 8
CHUNK_SECONDS = 1.0
SPEEDS = (1_000, 5_000, 10_000)
FORMATS = {"flac": {}, "mp3": {}, "wav": {"subtype": "PCM_16"}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--source", type=Path, default=SHARED_AUDIO / "flac")
    parser.add_argument(
        "--seconds", type=float, default=20, help="seconds of simulated GPU time per node"
    )
    parser.add_argument("--files", type=int, default=24, help="one-minute files per format")
    parser.add_argument("--results", type=Path, default=None)
    arguments = parser.parse_args()
    if not arguments.source.is_dir():
        parser.error(f"{arguments.source} is missing: set --source to a folder of audio")
    result: dict[str, Any] = {"script": "benchmarks/scaling.py"}
    with tempfile.TemporaryDirectory() as folder:
        corpora = write_corpora(arguments.source, Path(folder), arguments.files)
        result["decoding"] = {name: decoding(corpus) for name, corpus in corpora.items()}
        print(result["decoding"], flush=True)
        result["pipeline"] = {
            name: {f"{speed} x": pipeline(corpus, Path(folder), speed) for speed in SPEEDS}
            for name, corpus in corpora.items()
        }
        print(result["pipeline"], flush=True)
        result["nodes"] = scaling(Path(folder), arguments.seconds)
    write_result("scaling", result, *([arguments.results] if arguments.results else []))


def write_corpora(source: Path, folder: Path, files: int) -> dict[str, Path]:
    """Write the same minutes of real recordings in every format."""
    import numpy as np
    import soundfile

    paths = [path for path in sorted(source.rglob("*")) if path.is_file()]
    minutes: list[Any] = []
    while len(minutes) < files:
        before = len(minutes)
        for path in paths:
            try:
                audio, rate = soundfile.read(path, dtype="float32", always_2d=True)
            except soundfile.LibsndfileError:
                continue
            length = 60 * rate
            audio = np.tile(audio, (-(-length // len(audio)), 1))[:length]
            minutes.append((audio, rate))
            if len(minutes) == files:
                break
        assert len(minutes) > before, f"{source} contains no audio that soundfile can read"
    corpora = {}
    for name, options in FORMATS.items():
        corpora[name] = folder / name
        corpora[name].mkdir()
        for number, (audio, rate) in enumerate(minutes):
            soundfile.write(corpora[name] / f"{number:03}.{name}", audio, rate, **options)
    return corpora


def decoding(corpus: Path) -> dict[str, Any]:
    """Measure the CPU time of loading audio at the model's rate and channels in one thread."""
    from latentmill.audio import open_audio, open_media, prepare

    seconds, began = 0.0, time.thread_time()
    for path in sorted(corpus.iterdir()):
        with open_media(str(path)) as media:
            waveform = prepare(open_audio(media), sample_rate=44100, channels=1)
            for _ in waveform.blocks():
                pass
            seconds += waveform.stats.num_samples / 44100
    rate = seconds / (time.thread_time() - began)
    cores = {f"cores for {speed} x": round(speed / rate, 1) for speed in SPEEDS}
    return {"x_real_time_per_core": round(rate), **cores}


def prepared(songs: Path, out: Path, unit_seconds: float, **options: Any) -> tuple[Any, Any]:
    """Make a plan and the job of its workers, as a run does."""
    from latentmill.config import load_config
    from latentmill.engine.job import make_job
    from latentmill.engine.progress import Progress
    from latentmill.run.prepare import listed, planned, prepare

    values = {"source": str(songs), "out": str(out), "device": "cpu", "model": MODEL, **options}
    preparation = prepare(load_config(None, {**values, "unit_seconds": unit_seconds}), Progress())
    with listed(preparation) as items:
        plan, _ = planned(preparation, items)
    job = make_job(
        preparation.config, preparation.handle, preparation.chunking, plan, device="cpu", threads=1
    )
    return plan, job


MODEL = "python:simulated_gpu:build"


def pipeline(corpus: Path, folder: Path, speed: int) -> dict[str, Any]:
    """Run one worker with two units in flight, as in an actor, but without Ray."""
    from latentmill.encoding.timings import bound
    from latentmill.engine.worker import Worker

    out = folder / f"out-{corpus.name}-{speed}"
    options = {"batch_size": 16, "chunk_seconds": 5.0}
    plan, job = prepared(corpus, out, 120, model_options={"x_real_time": speed}, **options)
    worker = Worker(job)
    worker.origin()
    began, cpu_began = time.perf_counter(), time.process_time()
    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(worker.encode, plan.units))
    wall, cpu = time.perf_counter() - began, time.process_time() - cpu_began
    worker.close()
    seconds = sum(result.audio_seconds for result in results)
    return {
        "efficiency": round(seconds / speed / wall, 3),
        "x_real_time": round(seconds / wall),
        "x_real_time_per_core": round(seconds / cpu),
        "bound": bound(worker.timings()),
    }


def scaling(folder: Path, seconds: float) -> dict[str, Any]:
    """Measure the throughput of one and of two nodes with one core each."""
    import ray

    from latentmill.engine.actor import ActorShape
    from support import nodes, runs

    songs = max(8, round(seconds / BATCH_SECONDS / 2))
    corpus = runs.write_songs(folder / "songs", 2 * songs, 15.5)
    options = {"seconds": BATCH_SECONDS}
    settings = {"batch_size": BATCH, "chunk_seconds": CHUNK_SECONDS}
    throughput = {}
    cluster = nodes.Nodes()
    try:
        ray.init(cluster.address, logging_level="ERROR", log_to_driver=False)
        for count in (1, 2):
            cluster.add()
            out = folder / f"nodes-{count}"
            plan, job = prepared(corpus, out, 15, model_options=options, **settings)
            units = plan.units[: len(plan.units) * count // 2]
            throughput[count] = together(replace(job), ActorShape(1, 0), count, units)
        ray.shutdown()
    finally:
        cluster.shutdown()
    return {
        "seconds_per_batch": BATCH_SECONDS,
        "units_per_node": len(plan.units) // 2,
        "units_per_second": {str(count): round(rate, 3) for count, rate in throughput.items()},
        "efficiency": round(throughput[2] / (2 * throughput[1]), 3),
    }


def together(job: Any, shape: Any, workers: int, units: Any) -> float:
    """Return units per second, from when all workers are ready until the last commit."""
    from latentmill.engine.progress import Progress
    from latentmill.engine.scheduler import Scheduler

    began = 0.0

    class Together(Scheduler):
        def _fill(self) -> None:
            nonlocal began
            if sum(slot.ready for slot in self._slots) == workers and self._origin is not None:
                began = began or time.perf_counter()
                super()._fill()

    Together(job, shape, lambda: workers, Progress()).run(units, lambda origin: None)
    return len(units) / (time.perf_counter() - began)


if __name__ == "__main__":
    main()
