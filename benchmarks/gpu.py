"""lin-cae on a GPU: the model alone, and end to end from FLAC files to committed shards.

    python benchmarks/gpu.py [--modes tf32 bf16] [--minutes 300] [--decode-threads 16]

`model` feeds batches that are in memory, as a worker does; `end_to_end` is a worker without Ray:
it decodes FLAC, encodes, writes Parquet and commits, two units at a time, each of many files, as
a large corpus has them. The model is loaded and its kernels chosen before the clocks start. The
audio is real recordings, repeated; files beyond the first `DIFFERENT` are links to those.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from common import RESULTS, SHARED_AUDIO, machine, median, random_linear_cae, write_result
from models import count_work, feed, matrix_peak, pack, recording, seconds_of

FLAC_SECONDS = 180.0
DIFFERENT = 20
UNITS = 4  # a round: a file of its own each would leave all but one decode thread idle


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--size", choices=("full", "tiny"), default="full")
    parser.add_argument("--modes", nargs="+", help="default: tf32, bf16 and fp16; on a CPU float32")
    parser.add_argument("--audio", type=Path, default=SHARED_AUDIO / "ogg")
    parser.add_argument("--minutes", type=float, default=300, help="audio a round")
    parser.add_argument("--batch-size", type=int, help="chunks; default: found by trying")
    parser.add_argument("--decode-threads", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of gpu.json")
    arguments = parser.parse_args()
    import torch

    on_gpu = arguments.device.startswith("cuda")
    if on_gpu and not torch.cuda.is_available():
        print("There is no GPU here, so nothing was measured; --device cpu --size tiny tries it.")
        return
    if not arguments.audio.is_dir():
        parser.error(f"{arguments.audio} is missing: name a folder of audio with --audio")
    modes = arguments.modes or (["tf32", "bf16", "fp16"] if on_gpu else ["float32"])
    result: dict[str, Any] = {"script": "benchmarks/gpu.py", "device": arguments.device}
    with random_linear_cae(arguments.size), tempfile.TemporaryDirectory() as folder:
        print(machine(), flush=True)
        corpus = write_flac(arguments.audio, Path(folder) / "flac", arguments.minutes * 60)
        for mode in modes:
            result[mode] = {
                "model": model_alone(arguments, mode),
                "end_to_end": end_to_end(arguments, mode, corpus, Path(folder) / mode),
            }
            print(mode, result[mode], flush=True)
    result["weights"] = f"lin-cae with random weights, {arguments.size}"
    write_result("gpu", result, arguments.results)


def write_flac(source: Path, target: Path, seconds: float) -> Path:
    """A folder of 16-bit stereo FLAC files that hold so many seconds."""
    import numpy as np
    import soundfile

    target.mkdir()
    length = min(FLAC_SECONDS, seconds)
    audio = recording(source, 44100, 2, min(20.0, length))
    audio = np.resize(audio.T, (round(length * 44100), 2))
    for number in range(max(1, round(seconds / length))):
        path, first = (target / f"{one:04d}.flac" for one in (number, number % DIFFERENT))
        if path == first:
            soundfile.write(path, np.roll(audio, 44100 * number, axis=0), 44100, "PCM_16")
        else:
            path.hardlink_to(first)
    return target


def model_alone(arguments: Any, mode: str) -> dict[str, Any]:
    """Full batches from memory through the model."""
    from dataclasses import replace

    from latentmill.models import registry
    from latentmill.models.batch import find_batch_size

    handle = registry.resolve("lin-cae")
    device, spec = arguments.device, handle.spec
    if arguments.batch_size:
        spec = replace(spec, batch_size=dict.fromkeys(spec.batch_size, arguments.batch_size))
    model = handle.load(device)
    audio = recording(arguments.audio, spec.sample_rate, 1, min(20.0, 60 * arguments.minutes))
    chunk = pack(spec, audio, "cpu")[0][:1]
    size = spec.batch_size["cuda" if device.startswith("cuda") else "cpu"]
    if device.startswith("cuda") and not arguments.batch_size:  # as a worker finds it
        size = find_batch_size(model, chunk.shape[2], device, mode)  # type: ignore[arg-type]
    count = max(1, round(60 * arguments.minutes / (size * chunk.shape[2] / spec.sample_rate)))
    batches = [chunk.repeat(size, axis=0)] * count
    feed(model, batches[:1], device, mode)
    times = [seconds_of(lambda: feed(model, batches, device, mode), device) for _ in range(3)]
    seconds = count * size * chunk.shape[2] / spec.sample_rate
    work, peak = count_work(model, chunk, spec.sample_rate), matrix_peak(mode, device)
    return {
        "x_real_time": median([seconds / t for t in times]),
        "batch": [size, *chunk.shape[1:]],
        "gflop_per_audio_second": round(work / 1e9, 3),
        "matrix_peak_tflops": round(peak / 1e12, 4),
        "share_of_peak": round(seconds * work / median(times) / peak, 4),
    }


def end_to_end(arguments: Any, mode: str, corpus: Path, out: Path) -> dict[str, Any]:
    """Rounds of one worker on the FLAC files, each into a fresh store."""
    from latentmill.chunks import Chunking
    from latentmill.config import fingerprint_document, load_config
    from latentmill.engine.launch import make_job
    from latentmill.engine.worker import Worker
    from latentmill.models import registry
    from latentmill.plan import Cutting, Plan, draft, freeze
    from latentmill.sources.folder import FolderSource
    from latentmill.storage import Storage

    handle = registry.resolve("lin-cae")
    chunking = Chunking.for_model(handle.spec)
    device = arguments.device.partition(":")[0]
    rates = []
    for turn in range(arguments.rounds):
        options = {"model": "lin-cae", "precision": mode, "batch_size": arguments.batch_size}
        options |= {"decode_threads": arguments.decode_threads}
        options |= {"source": str(corpus), "out": str(out / str(turn))}
        config = load_config(None, options)
        plan = Plan(
            source=str(corpus),
            fingerprint=fingerprint_document(config, handle.spec, chunking),
            model="lin-cae",
            model_options={},
            format=config.format,
            ignored={},
        )
        cutting = Cutting(60 * arguments.minutes / UNITS)
        with draft(FolderSource(str(corpus), ("flac",)).items(), cutting) as items:
            plan = freeze(plan, items, Storage(config.out))
        worker = Worker(make_job(config, handle, chunking, plan, device=device, threads=2))
        worker.origin()
        began = time.perf_counter()
        with ThreadPoolExecutor(2) as pool:
            results = list(pool.map(worker.encode, plan.units))
        seconds = time.perf_counter() - began
        worker.close()
        assert not any(one.failed for one in results)
        rates.append(sum(one.audio_seconds for one in results) / seconds)
    return {
        "x_real_time": median(rates),
        "units": len(results),
        "files": sum(r.encoded for r in results),
    }


if __name__ == "__main__":
    main()
