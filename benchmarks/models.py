"""Compares each model and numeric mode with a direct call of the model's package.

    python benchmarks/models.py [--size full] [--models lin-cae mimi] [--seconds 20] [--rounds 3]

`ours` encodes a recording in the model's default chunks and batches, as a worker does, in a process
with a worker's memory settings. `package` encodes the same recording as in the package's README (no
inference mode), in its own process without these settings. They alternate; times are medians. All
models are the real classes with random weights. torch counts the operations, including attention;
the peak is that of a large matrix product in the same numeric mode and round. The deviation of a
mode compares its latents with those in float32, on real recordings. Results of models that are not
measured in this run are kept.
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from common import RESULTS, ROOT, SHARED_AUDIO, machine, median, random_linear_cae, write_result

# Without bf16 instructions, a CPU takes minutes for what takes seconds in float32.
MODES = {"cpu": ("float32",), "cuda": ("float32", "tf32", "bf16", "fp16")}
NAMES = ("mdct", "lin-cae", "oobleck", "dac", "encodec", "mimi")
PACKAGE = "--package-process"
README_CALL = {"max_chunk_size": 44100 * 10, "overlap_percentage": 0.25, "max_batch_size": 8}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--size", choices=("full", "tiny"), default="full")
    parser.add_argument("--models", nargs="+", choices=NAMES, default=NAMES)
    parser.add_argument("--modes", nargs="+", help="default: all modes of the device")
    parser.add_argument("--audio", type=Path, default=SHARED_AUDIO / "ogg")
    parser.add_argument("--seconds", type=float, default=20, help="length of the recording")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of models.json")
    arguments = parser.parse_args()
    settle_memory(arguments.device)
    if not arguments.audio.is_dir():
        parser.error(f"{arguments.audio} is missing: set --audio to a folder of audio")
    with random_linear_cae(arguments.size), tempfile.TemporaryDirectory() as folder:
        import torch

        from latentmill.models.inference.device import pick_device

        device = pick_device(arguments.device)
        torch.set_num_threads(arguments.threads)
        print(machine(), flush=True)
        setting = {"device": device, "weights": f"random, {arguments.size}"}
        result = {"script": "benchmarks/models.py", **setting}
        result |= others(arguments.results / "models.json", setting)
        for name in arguments.models:
            write_weights(name, arguments.size, Path(folder))
            result[name] = measure(name, Path(folder), device, arguments)
            write_result("models", result, arguments.results)


def others(path: Path, setting: dict[str, str]) -> dict[str, Any]:
    """Read earlier results of other models, on this machine with the same settings."""
    before = json.loads(path.read_text()) if path.exists() else {}
    if not {"machine": machine(), **setting}.items() <= before.items():
        return {}
    return {name: value for name, value in before.items() if name in NAMES}


def write_weights(name: str, size: str, root: Path) -> None:
    """Write random weights of the real class in its published configuration or a tiny one."""
    sys.path.insert(0, str(ROOT / "tests"))
    from support import tiny_models

    if name in ("mdct", "lin-cae"):
        return
    folder = root / name
    if size == "tiny":
        getattr(tiny_models, f"write_{name}")(folder)
    elif name == "oobleck":
        from diffusers import AutoencoderOobleck

        AutoencoderOobleck().save_pretrained(folder)
    else:
        import transformers

        prefix = name.capitalize()
        options = {}
        if name == "dac":  # the defaults are for 16 kHz
            options = {"downsampling_ratios": [2, 4, 8, 8], "sampling_rate": 44100}
        config = getattr(transformers, f"{prefix}Config")(**options)
        tiny_models._save(getattr(transformers, f"{prefix}Model")(config), folder)


def measure(name: str, root: Path, device: str, arguments: Any) -> dict[str, Any]:
    """Run rounds of every mode, its matrix peak, and the package's call, alternating."""
    from latentmill.models import registry

    handle = registry.resolve(name if name in ("mdct", "lin-cae") else f"{name}:{root / name}")
    model, spec = handle.load(device), handle.spec
    audio = recording(arguments.audio, spec.sample_rate, spec.channels, arguments.seconds)
    batches = pack(spec, audio, device)
    kind = device.partition(":")[0]
    modes = arguments.modes or MODES[kind]
    calls: dict[str, Callable[[], Timing]] = {
        mode: lambda mode=mode: timed(lambda: feed(model, batches, device, mode), device)
        for mode in modes
    }
    package = None if name == "mdct" else Package(name, root, audio, device, arguments.threads)
    if package:
        calls["package"] = package.call
    times: dict[str, list[float]] = {key: [] for key in calls}
    cpu: dict[str, list[float]] = {key: [] for key in calls}  # varies less on a shared machine
    peaks: dict[str, list[float]] = {mode: [] for mode in modes}
    for call in calls.values():  # the first call chooses kernels and allocates memory
        call()
    for _ in range(arguments.rounds):
        for key, call in calls.items():
            timing = call()
            times[key].append(timing.seconds)
            cpu[key].append(timing.cpu_seconds)
            if key in peaks:
                peaks[key].append(matrix_peak(key, device))
    if package:
        package.close()
    seconds = audio.shape[1] / spec.sample_rate
    work = count_work(model, batches[0][:1], spec.sample_rate)
    result: dict[str, Any] = {
        "rounds": arguments.rounds,
        "audio_seconds": round(seconds, 2),
        "encoded_seconds": round(sum(b[:, 0].size for b in batches) / spec.sample_rate, 2),
        "batch": list(batches[0].shape),
        "gflop_per_audio_second": round(work / 1e9, 3),
    }
    exact = feed(model, batches, device, "float32")
    for mode in modes:
        done = result["encoded_seconds"] * work / median(times[mode])
        result[mode] = {
            "x_real_time": median([seconds / t for t in times[mode]]),
            "matrix_peak_tflops": median([peak / 1e12 for peak in peaks[mode]]),
            "share_of_peak": round(done / median(peaks[mode]), 4),
            "cpu_seconds": median(cpu[mode]),
            "deviation_from_float32": 0.0
            if mode == "float32"
            else deviation(feed(model, batches, device, mode), exact),
        }
        if package:
            ratios = [p / t for p, t in zip(times["package"], times[mode], strict=True)]
            result[mode]["over_package"] = median(ratios)
            result[mode]["over_package_by_round"] = [round(ratio, 3) for ratio in ratios]
            ratios = [p / t for p, t in zip(cpu["package"], cpu[mode], strict=True)]
            result[mode]["over_package_in_cpu_seconds"] = [round(ratio, 3) for ratio in ratios]
    if package:
        result["package_x_real_time"] = median([seconds / t for t in times["package"]])
    if name == "lin-cae":
        result["latents_differ_from_package"] = difference(model, audio, device)
    return result


def recording(folder: Path, rate: int, channels: int, seconds: float) -> Any:
    """Load real recordings, concatenated to `[C, T]`, at a model's rate."""
    import numpy as np
    import soundfile
    import soxr

    parts, wanted, have = [], round(seconds * rate), 0
    paths = [p for p in sorted(folder.rglob("*")) if p.suffix in (".ogg", ".flac", ".wav")]
    for path in paths:
        audio, source_rate = soundfile.read(path, dtype="float32", always_2d=True)
        mono = soxr.resample(audio.mean(axis=1), source_rate, rate)
        parts.append(mono[: wanted - have])
        have += len(parts[-1])
        if have == wanted:
            break
    if have < wanted:
        raise SystemExit(f"{folder} has only {have / rate:.1f} s of audio: reduce --seconds")
    return np.tile(np.concatenate(parts), (channels, 1))


def pack(spec: Any, audio: Any, device: str) -> list[Any]:
    """Split a recording into batches `[B, C, T]` as a worker does."""
    from latentmill.encoding.batches import Packer
    from latentmill.encoding.chunks import Chunker, Chunking

    chunking = Chunking.for_model(spec)
    chunker = Chunker(spec, chunking)
    packer = Packer(chunking, spec.batch_size["cuda" if device.startswith("cuda") else "cpu"])
    batches = []
    for chunk in [*chunker.push(audio), *chunker.finish()]:
        batches += packer.add(0, chunk)
    return [batch.audio() for batch in [*batches, *packer.flush()]]


def feed(model: Any, batches: list[Any], device: str, mode: str) -> list[Any]:
    """Encode the batches through the worker's device pipeline."""
    from latentmill.models.inference.device_pipeline import DevicePipeline

    feeder = DevicePipeline(model, device, mode)  # type: ignore[arg-type]
    latents = []
    for batch in batches:
        latents += feeder.push(batch)
    return [*latents, *feeder.flush()]


class Timing(NamedTuple):
    """Wall time, and CPU time of all threads of the process."""

    seconds: float
    cpu_seconds: float


def timed(call: Callable[[], Any], device: str) -> Timing:
    began = time.process_time()
    seconds = seconds_of(call, device)
    return Timing(seconds, time.process_time() - began)


def settle_memory(device: str) -> None:
    """Restart this process with the memory settings of a CPU worker, which are read at startup."""
    from latentmill.models.inference.device import KEEP_FREED_MEMORY

    there = KEEP_FREED_MEMORY.items() <= os.environ.items()
    if not device.startswith("cuda") and not there:
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **KEEP_FREED_MEMORY})


class Package:
    """The package's own call, in a process with default memory settings."""

    def __init__(self, name: str, root: Path, audio: Any, device: str, threads: int) -> None:
        env = {key: value for key, value in os.environ.items() if not key.startswith("MALLOC_")}
        self._process = subprocess.Popen(
            [sys.executable, __file__, PACKAGE],
            env=env,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        assert self._process.stdin is not None
        pickle.dump((name, root, audio, device, threads), self._process.stdin)
        self._process.stdin.flush()

    def call(self) -> Timing:
        """Encode the recording once."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(b"\n")
        self._process.stdin.flush()
        seconds, cpu_seconds = self._process.stdout.readline().split()
        return Timing(float(seconds), float(cpu_seconds))

    def close(self) -> None:
        """Stop the process."""
        self._process.communicate()


def serve_package() -> None:
    """Main loop of that process: one call and one output line for each input line."""
    import torch

    name, root, audio, device, threads = pickle.load(sys.stdin.buffer)
    torch.set_num_threads(threads)
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")  # the packages may print
    sys.stdout = sys.stderr
    call = package_call(name, root, audio, device)
    while sys.stdin.buffer.readline():
        timing = timed(call, device)
        print(timing.seconds, timing.cpu_seconds, file=answers, flush=True)


def package_call(name: str, root: Path, audio: Any, device: str) -> Callable[[], Any]:
    """Return a function that encodes a recording as in the package's README or model card."""
    import torch

    wave = torch.from_numpy(audio).to(device)
    if name == "lin-cae":
        from linear_cae import Autoencoder

        model = Autoencoder.from_pretrained("lin-cae", **README_CALL).to(device)
        return lambda: model.encode(wave)
    if name == "oobleck":
        import diffusers

        oobleck = diffusers.AutoencoderOobleck.from_pretrained(root / name / _sub(root / name))
        oobleck.to(device)
        return lambda: oobleck.encode(wave[None]).latent_dist.mean
    import transformers

    codec = getattr(transformers, f"{name.capitalize()}Model").from_pretrained(root / name)
    codec.to(device)
    return lambda: codec.encode(wave[None])


def _sub(folder: Path) -> str:
    return "vae" if (folder / "vae").is_dir() else ""


def seconds_of(call: Callable[[], Any], device: str) -> float:
    import torch

    wait = torch.cuda.synchronize if device.startswith("cuda") else lambda: None
    wait()
    began = time.perf_counter()
    call()
    wait()
    return time.perf_counter() - began


def matrix_peak(mode: str, device: str) -> float:
    """Measure FLOP per second of a large matrix product in a numeric mode; best of three."""
    import torch

    from latentmill.models.inference.precision import numeric_mode

    size = 8192 if device.startswith("cuda") else 1024
    a, b = torch.randn(2, size, size, device=device)
    with torch.inference_mode(), numeric_mode(mode, device):  # type: ignore[arg-type]
        best = min(seconds_of(lambda: a @ b, device) for _ in range(4))
    return 2 * size**3 / best


def count_work(model: Any, chunk: Any, rate: int) -> float:
    """Return the floating-point operations per second of audio, counted by torch."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        model.encode(torch.from_numpy(chunk))
    return float(counter.get_total_flops() * rate / chunk.shape[2])


def deviation(latents: list[Any], exact: list[Any]) -> float:
    """||latents - exact|| / ||exact|| over all batches."""
    import numpy as np

    error = sum(np.square(a - b).sum() for a, b in zip(latents, exact, strict=True))
    return float(np.sqrt(error / sum(np.square(b).sum() for b in exact)))


def difference(model: Any, audio: Any, device: str) -> float:
    """Compare our latents with the package's on the package's first chunk."""
    import torch
    from linear_cae import Autoencoder

    package = Autoencoder.from_pretrained("lin-cae", **README_CALL).to(device)
    length = min(README_CALL["max_chunk_size"], audio.shape[1]) // 512 * 512  # type: ignore[type-var]
    wave = torch.from_numpy(audio[:, : int(length)])
    theirs = package.encode(wave.to(device)).detach().cpu()
    return float((model.encode(wave[None]).cpu() - theirs).norm() / theirs.norm())


if __name__ == "__main__":
    serve_package() if sys.argv[1:] == [PACKAGE] else main()
