"""Compares the speed of `stitch: state` with that of `stitch: trim` for Mimi.

    python benchmarks/stateful.py [--seconds 300] [--items 2] [--rounds 3] [--threads 1]

The real architecture with random weights encodes long items, which are the recordings of a folder
one after the other, from another one on for each item. Loading, packing and stitching are those of
a worker, as are its memory settings. The ways of stitching take turns; times are medians of the
rounds. CPU time is given, too, because it varies less on a shared machine. `--chunk-seconds`
repeats `state` with shorter chunks. The equality of the latents with those of whole items is
tested (`tests/models/families/test_streaming.py`).
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from common import RESULTS, ROOT, SHARED_AUDIO, machine, median, write_result
from models import settle_memory


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--audio", type=Path, default=SHARED_AUDIO / "ogg")
    parser.add_argument("--seconds", type=float, default=300, help="length of an item")
    parser.add_argument("--items", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--chunk-seconds", nargs="*", type=float, default=[20.0])
    parser.add_argument("--size", choices=("full", "tiny"), default="full")
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    settle_memory("cpu")
    if not arguments.audio.is_dir():
        parser.error(f"{arguments.audio} is missing: set --audio to a folder of audio")
    import torch

    torch.set_num_threads(arguments.threads)
    print(machine(), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        measure(Path(folder), arguments)


def measure(folder: Path, arguments: Any) -> None:
    from latentmill.encoding.chunks import Chunking
    from latentmill.models.registry import resolve

    write_weights(folder / "mimi", arguments.size)
    model = resolve(f"mimi:{folder / 'mimi'}").load("cpu")
    rate, seconds = model.spec.sample_rate, arguments.seconds
    write_items(arguments.audio, folder / "items", rate, seconds, arguments.items)
    ways = {stitch: Chunking.for_model(model.spec, stitch=stitch) for stitch in ("trim", "state")}
    for length in arguments.chunk_seconds:
        ways[f"state, chunks of {length:g} s"] = Chunking.for_model(
            model.spec, stitch="state", seconds=length
        )
    times: dict[str, list[tuple[float, float]]] = {way: [] for way in ways}
    for number in range(1, arguments.rounds + 1):
        for way, chunking in ways.items():
            taken = encode(model, folder / "items", chunking)
            times[way].append(taken)
            print(f"round {number}, {way}: {taken[0]:.1f} s, CPU {taken[1]:.1f} s", flush=True)
        write_result("stateful", summary(arguments, ways, times, rate), arguments.results)


def summary(
    arguments: Any,
    ways: dict[str, Any],
    times: dict[str, list[tuple[float, float]]],
    rate: int,
) -> dict[str, Any]:
    audio = arguments.items * arguments.seconds
    result: dict[str, Any] = {
        "script": "benchmarks/stateful.py",
        "model": f"mimi, random weights, {arguments.size}",
        "audio": f"{arguments.items} items of {arguments.seconds:g} s",
        "threads": arguments.threads,
        "rounds": len(times["trim"]),
    }
    for way, taken in times.items():
        wall, cpu = (median([one[kind] for one in taken]) for kind in (0, 1))
        result[way] = {
            "chunk_seconds": ways[way].samples / rate,
            "x_real_time": round(audio / wall, 2),
            "x_real_time_per_cpu_second": round(audio / cpu, 2),
        }
    for kind in ("x_real_time", "x_real_time_per_cpu_second"):
        result[f"state_over_trim_{kind}"] = round(result["state"][kind] / result["trim"][kind], 3)
    return result


def write_weights(folder: Path, size: str) -> None:
    sys.path.insert(0, str(ROOT / "tests"))
    from support import tiny_models

    if size == "tiny":
        tiny_models.write_mimi(folder)
        return
    import torch
    from transformers import MimiConfig, MimiModel

    torch.manual_seed(0)
    tiny_models._save(MimiModel(MimiConfig()), folder)


def write_items(audio: Path, folder: Path, rate: int, seconds: float, count: int) -> None:
    """Write WAV files of the recordings, one after the other."""
    import numpy as np
    import soundfile
    import soxr

    folder.mkdir()
    recordings = []
    for path in sorted(audio.iterdir()):
        with contextlib.suppress(soundfile.LibsndfileError):  # not audio
            samples, source_rate = soundfile.read(path, dtype="float32", always_2d=True)
            recordings.append(soxr.resample(samples.mean(axis=1), source_rate, rate))
    for number in range(count):
        order = recordings[number:] + recordings[:number]
        whole = np.resize(np.concatenate(order), round(seconds * rate))
        soundfile.write(folder / f"{number}.wav", whole, rate, subtype="FLOAT")


def encode(model: Any, folder: Path, chunking: Any) -> tuple[float, float]:
    """Encode the items of a folder; return the wall and CPU time."""
    from latentmill.encoding.encoder import UnitEncoder
    from latentmill.encoding.loading import EncodeSettings, Loading
    from latentmill.encoding.timings import Timings
    from latentmill.encoding.unit_audio import LocalAudio
    from latentmill.sources.folder import FolderSource

    settings = EncodeSettings(dtype="float32", load_threads=1)
    items = sorted(FolderSource(str(folder), ("wav",)).items(), key=lambda item: item.key)
    began = time.perf_counter(), time.process_time()
    loading = Loading(model.spec, chunking, settings)
    with contextlib.closing(LocalAudio(items, loading, Timings())) as audio:
        outcomes = list(UnitEncoder(model, chunking, settings).encode(audio))
    assert all(outcome.status == "encoded" for outcome in outcomes)
    return time.perf_counter() - began[0], time.process_time() - began[1]


if __name__ == "__main__":
    main()
