"""Decoding in Ray tasks against decoding in the worker's own threads: what it costs and frees.

    python benchmarks/load_tasks.py [--source FOLDER] [--files 16] [--rounds 3]

The same minutes of real recordings as FLAC, MP3 and WAV are decoded to the rate and channels of
lin-cae's input (44.1 kHz mono) and cut into chunks, by as many threads and by as many tasks as
this machine has cores, in turns, and thrown away. `tasks_over_threads` compares the throughput on
the same cores: what the way through the object store costs. `x_real_time_per_worker_core` is the
audio that a core of the worker's own node can take in: from tasks it only receives, so that is
what decoding on other nodes frees. Medians of the rounds.
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
from latentmill.encoding.timings import Meter
from latentmill.encoding.unit_audio import EncodeSettings, Loading, LocalAudio
from latentmill.engine.remote_audio import RemoteAudio
from latentmill.models.families import mdct
from latentmill.sources.folder import FolderSource
from scaling import write_corpora

SPEC = mdct.build(hop=1024, sample_rate=44100).spec
CHUNKING = Chunking.for_model(SPEC, seconds=10.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--source", type=Path, default=SHARED_AUDIO / "flac")
    parser.add_argument("--files", type=int, default=16, help="of a minute each, per format")
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
    """Both ways in turns, once more than counted so that the tasks' processes are there."""
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
            with contextlib.closing(open_audio_of(items, decoding, Meter())) as audio:
                samples = sum(
                    event.audio.shape[1] for *_, event in audio if isinstance(event, Chunk)
                )
            seconds.add(samples / SPEC.sample_rate)
            if number:
                walls[way].append(time.perf_counter() - began)
                own[way].append(time.process_time() - cpu_began)
        (total,) = seconds  # both gave the same
    return {
        "x_real_time": {way: round(total / median(some)) for way, some in walls.items()},
        "x_real_time_per_worker_core": {
            way: round(total / median(some)) for way, some in own.items()
        },
        "tasks_over_threads": round(median(walls["threads"]) / median(walls["tasks"]), 2),
    }


if __name__ == "__main__":
    main()
