"""Compares loading audio in Ray tasks with loading it in the worker's own threads.

    python benchmarks/load_tasks.py [--source FOLDER] [--files 16] [--rounds 3]

The same minutes of real recordings, as FLAC, MP3 and WAV, are loaded at the rate and channels of
lin-cae's input (44.1 kHz mono), split into chunks and discarded: alternately by as many threads and
by as many tasks as this machine has cores. `tasks_over_threads` compares the throughput on the same
cores, which shows the cost of the object store. `x_real_time_per_worker_core` is the audio that a
core of the worker's node can process: with tasks, it only receives the chunks, so this shows how
much loading on other nodes saves. Results are medians of the rounds.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import tempfile
import time
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import ray

from common import SHARED_AUDIO, write_result
from latentmill.encoding.chunks import Chunk, Chunking
from latentmill.encoding.loading import EncodeSettings, Loading
from latentmill.encoding.timings import Timings
from latentmill.encoding.unit_audio import LocalAudio
from latentmill.engine.remote_audio import RemoteAudio
from latentmill.models.families import mdct
from latentmill.sources.folder import FolderSource
from scaling import write_corpora

SPEC = mdct.build(hop=1024, sample_rate=44100).spec
CHUNKING = Chunking.for_model(SPEC, seconds=10.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--source", type=Path, default=SHARED_AUDIO / "flac")
    parser.add_argument("--files", type=int, default=16, help="one-minute files per format")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--results", type=Path, default=None)
    arguments = parser.parse_args()
    cores = os.cpu_count() or 1
    ray.init(
        "local",
        num_cpus=cores,
        include_dashboard=False,
        object_store_memory=512 << 20,
        logging_level="ERROR",
        log_to_driver=False,
    )
    result: dict[str, Any] = {"script": "benchmarks/load_tasks.py", "threads and tasks": cores}
    with tempfile.TemporaryDirectory() as folder:
        corpora = write_corpora(arguments.source, Path(folder), arguments.files)
        for name, corpus in corpora.items():
            result[name] = compared(corpus, cores, arguments.rounds)
            print(name, result[name], flush=True)
    ray.shutdown()
    write_result("load_tasks", result, *([arguments.results] if arguments.results else []))


def compared(corpus: Path, cores: int, rounds: int) -> dict[str, Any]:
    """Alternate both ways; an extra uncounted round starts the tasks' processes."""
    found = FolderSource(str(corpus), (corpus.name,)).items()
    items = sorted(found, key=lambda item: item.key)
    decoding = Loading(SPEC, CHUNKING, EncodeSettings(load_threads=cores))
    ways = {"threads": LocalAudio, "tasks": partial(RemoteAudio, tasks=cores)}
    walls: dict[str, list[float]] = {way: [] for way in ways}
    own: dict[str, list[float]] = {way: [] for way in ways}
    for number in range(rounds + 1):
        seconds = set()
        for way, open_audio_of in ways.items():
            began, cpu_began = time.perf_counter(), time.process_time()
            with contextlib.closing(open_audio_of(items, decoding, Timings())) as audio:
                samples = sum(
                    event.audio.shape[1] for *_, event in audio if isinstance(event, Chunk)
                )
            seconds.add(samples / SPEC.sample_rate)
            if number:
                walls[way].append(time.perf_counter() - began)
                own[way].append(time.process_time() - cpu_began)
        (total,) = seconds  # both loaded the same audio
    return {
        "x_real_time": {way: round(total / median(some)) for way, some in walls.items()},
        "x_real_time_per_worker_core": {
            way: round(total / median(some)) for way, some in own.items()
        },
        "tasks_over_threads": round(median(walls["threads"]) / median(walls["tasks"]), 2),
    }


if __name__ == "__main__":
    main()
