"""The process of one model in `gpu.py`: makes random weights, then runs the requested parts.

A part sends each figure as soon as it is measured, so that a crash or a time limit loses only the
remaining figures.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shutil
import statistics
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from common import ROOT

MODELS = ("lin-cae", "same-s", "same-l", "mimi", "oobleck")
SAME_SIZES = {
    "same-s": {},  # the defaults of the class
    "same-l": {"encoder_channels": 256, "encoder_transformer_depths": [12]},
}
DEVIATION_CHUNKS = 4
DISTINCT_CHUNKS = 32
COPY_SECONDS = 8.0
Emit = Callable[[str, Any], None]


def main() -> None:
    """Prepare and report it, then run the parts requested on standard input until it ends."""
    settings = json.loads(sys.argv[1])
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")  # the packages may print
    sys.stdout = sys.stderr

    def emit(key: str, value: Any) -> None:
        print(json.dumps({"key": key, "value": value}), file=answers, flush=True)

    subject = None
    emit("started", time.perf_counter())
    with reported(emit):
        subject = Subject.make(settings)
        emit("prepared", subject.description())
    emit("end", None)
    for line in sys.stdin:
        part = json.loads(line)
        with reported(emit):
            assert subject is not None
            PARTS[part.pop("part")](subject, emit, **part)
        subject = clean(subject)
        emit("end", None)


@contextlib.contextmanager
def reported(emit: Emit) -> Iterator[None]:
    """Record an exception of a part as one of its figures, so that the next part can run."""
    try:
        yield
    except Exception as error:  # noqa: BLE001
        traceback.print_exc()
        emit("error", f"{type(error).__name__}: {' '.join(str(error).split())[:500]}")


def clean(subject: Subject | None) -> Subject | None:
    """Free the GPU memory of a part, because other models' processes need it."""
    import gc

    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return subject


@dataclass
class Subject:
    """A loaded model and the settings to measure it with.

    Attributes:
        name: One of `MODELS`.
        handle: The model's handle, with its files.
        model: The model on the device.
        size: Chunks in a full batch; 0 until determined.
        settings: Settings of the run.
    """

    name: str
    handle: Any
    model: Any
    size: int
    settings: dict[str, Any]

    @classmethod
    def make(cls, settings: dict[str, Any]) -> Subject:
        """Write random weights and load them with the library."""
        import torch

        from latentmill.models import registry

        name, device = settings["model"], settings["device"]
        if device == "cpu":
            torch.set_num_threads(1)  # for trying out the script, possibly on a busy machine
        root = Path(settings["folder"]) / name
        model, options = write_weights(name, settings["size"], root, device)
        handle = registry.resolve(model, options)
        return cls(name, handle, handle.load(device), settings["batch_size"] or 0, settings)

    @property
    def device(self) -> str:
        """The model's device in torch's notation."""
        return str(self.settings["device"])

    @property
    def on_gpu(self) -> bool:
        """Whether the device is a GPU."""
        return self.device.startswith("cuda")

    @property
    def chunking(self) -> Any:
        """The default chunking, or that of --chunk-seconds."""
        from latentmill.encoding.chunks import Chunking

        return Chunking.for_model(self.handle.spec, seconds=self.settings["chunk_seconds"])

    def description(self) -> dict[str, Any]:
        """Return the fixed properties of the model for the result."""
        spec, chunking = self.handle.spec, self.chunking
        return {
            "sample_rate": spec.sample_rate,
            "channels": spec.channels,
            "latent_channels": spec.latent_channels,
            "chunk_frames": spec.frames(chunking.model_samples(spec)),
            "chunk_seconds": round(chunking.samples / spec.sample_rate, 3),
            "overlap_frames": chunking.overlap,
        }

    def batch_size(self, mode: str) -> int:
        """Return the number of chunks in a full batch; determined once, as in a worker."""
        from latentmill.models.inference.batch import find_batch_size

        if not self.size:
            spec = self.handle.spec
            self.size = spec.batch_size["cuda" if self.on_gpu else "cpu"]
            if self.on_gpu:
                samples = self.chunking.model_samples(spec)
                self.size = find_batch_size(self.model, samples, self.device, mode)  # type: ignore[arg-type]
        return self.size

    def audio(self, size: int, samples: int) -> Any:
        """Return chunks `[size, C, samples]` of music; beyond `DISTINCT_CHUNKS`, rotated copies."""
        import numpy as np

        from latentmill.audio import open_audio, open_media, prepare

        spec = self.handle.spec
        distinct = min(size, DISTINCT_CHUNKS)
        wanted, parts = distinct * samples, []
        files = sorted(Path(self.settings["corpus"]).iterdir(), key=lambda f: -f.stat().st_size)
        while wanted > 0:
            for path in files:
                with open_media(str(path)) as media:
                    wave = prepare(
                        open_audio(media), sample_rate=spec.sample_rate, channels=spec.channels
                    )
                    for block in wave.blocks():
                        parts.append(block[:, :wanted])
                        wanted -= parts[-1].shape[1]
                        if wanted <= 0:
                            break
                if wanted <= 0:
                    break
        chunks = np.concatenate(parts, axis=1).reshape(spec.channels, distinct, samples)
        chunks = chunks.transpose(1, 0, 2)  # [distinct, C, samples]
        turned = [np.roll(chunks, 997 * turn, axis=2) for turn in range(-(-size // distinct))]
        return np.ascontiguousarray(np.concatenate(turned)[:size], np.float32)

    def wait(self) -> None:
        """Wait until the device is done."""
        import torch

        if self.on_gpu:
            torch.cuda.synchronize()


def write_weights(
    name: str, size: str, root: Path, device: str
) -> tuple[str, dict[str, str | int | float | bool | None]]:
    """Write random weights of the real class; returns the library's model name and options."""
    sys.path.insert(0, str(ROOT / "tests"))
    import torch

    if name == "lin-cae":
        from support.linear_cae_weights import write_folder

        write_folder(root, "lin-cae", size)
        return "lin-cae", {"repo": str(root)}
    from support import tiny_models

    family = name.partition("-")[0]
    if size == "tiny":
        getattr(tiny_models, f"write_{family}")(root)
    elif family == "mimi":
        from transformers import MimiConfig, MimiModel

        tiny_models._save(MimiModel(MimiConfig()), root)
    elif family == "oobleck":
        from diffusers import AutoencoderOobleck

        AutoencoderOobleck().save_pretrained(root)
    else:
        from diffusers import AutoencoderSAME

        with torch.device(device):
            model = AutoencoderSAME(**SAME_SIZES[name])
        for parameter in model.parameters():
            if (
                parameter.ndim == 2 and not parameter.any()
            ):  # otherwise later layers would have no effect
                parameter.data.normal_(std=parameter.shape[1] ** -0.5)
        model.to("cpu").save_pretrained(root)
    return f"{family}:{root}", {}


def alone(subject: Subject, emit: Emit, *, seconds: float, modes: list[str]) -> None:
    """Encode full batches of music from memory in each numeric mode.

    `on_the_gpu`: audio and latents stay on the GPU. `through_feed`: from arrays to arrays, through
    the device pipeline of a worker. Both count the overlap of neighbouring chunks once.
    """
    import torch

    from latentmill.models.inference.device_pipeline import DevicePipeline
    from latentmill.models.inference.precision import numeric_mode
    from models import count_work, matrix_peak

    began = time.perf_counter()
    spec, chunking, device = subject.handle.spec, subject.chunking, subject.device
    size = subject.batch_size("tf32" if subject.on_gpu else "float32")
    samples = chunking.model_samples(spec)
    emit("batch", [size, spec.channels, samples])
    emit("batch_search_seconds", round(time.perf_counter() - began, 2))
    host = subject.audio(size, samples)
    new = size * min(samples, chunking.step) / spec.sample_rate
    there, few = torch.from_numpy(host).to(device), host[:DEVIATION_CHUNKS]
    work = count_work(subject.model, host[:1], spec.sample_rate)
    emit("gflop_per_audio_second", round(work / 1e9, 3))
    exact = encoded(subject, few, "float32")
    for mode in modes:
        reset_peak(subject)
        with numeric_mode(mode, device):  # type: ignore[arg-type]
            batches = timed(subject, lambda: subject.model.encode(there), seconds / len(modes) / 2)
        peak = peak_gib(subject)
        feeder = DevicePipeline(subject.model, device, mode)  # type: ignore[arg-type]
        for _ in range(2):
            list(feeder.push(host))
        list(feeder.flush())
        subject.wait()
        start, count = time.perf_counter(), 0
        while time.perf_counter() - start < seconds / len(modes) / 2 or count < 2:
            list(feeder.push(host))
            count += 1
        list(feeder.flush())
        through = count * new / (time.perf_counter() - start)
        rate = matrix_peak(mode, device)
        done = size * samples / spec.sample_rate * work / statistics.median(batches)
        emit(
            mode,
            {
                "on_the_gpu_x_real_time": round(new / statistics.median(batches), 1),
                "through_feed_x_real_time": round(through, 1),
                "batch_ms": round(1000 * statistics.median(batches), 3),
                "batches": len(batches),
                "tflops": round(done / 1e12, 2),
                "matrix_peak_tflops": round(rate / 1e12, 1),
                "deviation_from_float32": relative(encoded(subject, few, mode), exact),
                "peak_gpu_gib": peak,
            },
        )
    if subject.on_gpu:
        emit("synchronising_calls", synchronising(subject, host))


def encoded(subject: Subject, audio: Any, mode: str) -> Any:
    """Encode in a numeric mode; returns the latents on the CPU."""
    import torch

    from latentmill.models.inference.precision import numeric_mode

    with numeric_mode(mode, subject.device):  # type: ignore[arg-type]
        return subject.model.encode(torch.from_numpy(audio).to(subject.device)).float().cpu()


def relative(latents: Any, exact: Any) -> float:
    """||latents - exact|| / ||exact||."""
    return float((latents - exact).norm() / exact.norm())


def timed(subject: Subject, call: Callable[[], Any], seconds: float) -> list[float]:
    """Repeat a call for some seconds after two warm-up calls; returns at least two times."""
    for _ in range(2):
        call()
    subject.wait()
    times: list[float] = []
    while sum(times) < seconds or len(times) < 2:
        began = time.perf_counter()
        call()
        subject.wait()
        times.append(time.perf_counter() - began)
    return times


def reset_peak(subject: Subject) -> None:
    """Reset the peak of GPU memory."""
    import torch

    if subject.on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak_gib(subject: Subject) -> float | None:
    """Return the peak of GPU memory used by tensors since the reset."""
    import torch

    if not subject.on_gpu:
        return None
    return round(torch.cuda.max_memory_allocated() / 2**30, 2)


def synchronising(subject: Subject, host: Any) -> dict[str, int]:
    """Count calls of the device pipeline that wait for the GPU, by line of code."""
    import torch

    from latentmill.models.inference.device_pipeline import DevicePipeline

    feeder = DevicePipeline(subject.model, subject.device, "tf32")
    found: dict[str, int] = {}
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(2):
                list(feeder.push(host[:8]))
            list(feeder.flush())
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for one in caught:
        if "synchroniz" in str(one.message):
            place = f"{Path(one.filename).name}:{one.lineno}"
            found[place] = found.get(place, 0) + 1
    return found


def loading(subject: Subject, emit: Emit, *, seconds: float, threads: int) -> None:
    """Load audio without a model: read FLAC, downmix and resample, then discard it."""
    from latentmill.audio import open_audio, open_media, prepare

    spec = subject.handle.spec
    paths = itertools.cycle(sorted(Path(subject.settings["corpus"]).iterdir()))
    lock, until = threading.Lock(), time.perf_counter() + seconds

    def load(_: int) -> int:
        samples = 0
        while time.perf_counter() < until:
            with lock:
                path = next(paths)
            with open_media(str(path)) as media:
                wave = prepare(
                    open_audio(media), sample_rate=spec.sample_rate, channels=spec.channels
                )
                for block in wave.blocks():
                    samples += block.shape[1]
                    if time.perf_counter() > until:
                        break
        return samples

    with ThreadPoolExecutor(threads) as pool:
        total = sum(pool.map(load, range(threads)))
    emit("threads", threads)
    emit("x_real_time", round(total / spec.sample_rate / seconds, 1))


@dataclass(frozen=True)
class Loaded:
    """A handle whose model is already loaded, for a worker in this process."""

    spec: Any
    model: Any

    def load(self, device: str) -> Any:
        """Return the loaded model."""
        del device
        return self.model


def end_to_end(
    subject: Subject, emit: Emit, *, seconds: float, mode: str, threads: int, cold_bytes: int = 0
) -> None:
    """Run a worker without Ray: FLAC files to committed shards, two units at a time.

    The plan and the batch size are determined before timing starts, as for every worker but the
    first. The result counts the audio that the model has encoded when timing stops.
    """
    source = Path(subject.settings["corpus"])
    out = Path(subject.settings["folder"]) / f"store-{subject.name}"
    if cold_bytes:
        source = copy_cold(source, out.with_name("cold"), cold_bytes)
        emit("cold_bytes", sum(path.stat().st_size for path in source.iterdir()))
    try:
        encode(subject, emit, source, out, seconds, mode, threads)
    finally:
        shutil.rmtree(out, ignore_errors=True)
        if cold_bytes:
            shutil.rmtree(source, ignore_errors=True)


def encode(
    subject: Subject,
    emit: Emit,
    source: Path,
    out: Path,
    seconds: float,
    mode: str,
    threads: int,
) -> None:
    """See `end_to_end`."""

    from latentmill.config import load_config
    from latentmill.encoding.timings import bound
    from latentmill.engine.job import make_job
    from latentmill.engine.worker import Stopped, Worker
    from latentmill.run.prepare import Preparation, listed, planned
    from latentmill.sources.open import open_source
    from latentmill.storage.storage import Storage

    options = {"source": str(source), "out": str(out), "model": subject.name}
    options |= {"precision": mode, "batch_size": subject.batch_size(mode)}
    options |= {"chunk_seconds": subject.settings["chunk_seconds"]}
    options |= {"device": subject.device.partition(":")[0], "load_threads": threads}
    config = load_config(None, options)
    handle, chunking = Loaded(subject.handle.spec, subject.model), subject.chunking
    prepared = Preparation(config, handle, chunking, Storage(config.out), open_source(config))
    plan, _ = planned(prepared, listed(prepared))
    job = make_job(config, handle, chunking, plan, device=config.device, threads=2)
    stopped = threading.Event()
    worker = Worker(replace(job, store=Storage(config.out).root), stopped)
    with contextlib.closing(worker):
        worker.origin()
        encoded(
            subject,
            subject.audio(job.settings.batch_size, job.chunking.model_samples(handle.spec)),
            mode,
        )
        reset_peak(subject)
        units = iter(plan.units)
        results: list[Any] = []
        lock = threading.Lock()

        def serve() -> None:
            while not stopped.is_set():
                with lock:
                    unit = next(units, None)
                if unit is None:
                    return
                with contextlib.suppress(Stopped):
                    results.append(worker.encode(unit))

        read, cpu, began = bytes_read(), time.process_time(), time.perf_counter()
        samples = [(0.0, 0.0)]
        with ThreadPoolExecutor(2) as pool:
            serving = [pool.submit(serve) for _ in range(2)]
            while not all(one.done() for one in serving):
                time.sleep(min(0.5, seconds / 10))
                samples.append((time.perf_counter() - began, worker.timings()["audio_seconds"]))
                if samples[-1][0] >= seconds and not stopped.is_set():
                    stages, stop = worker.timings(), len(samples)
                    cpu_seconds = time.process_time() - cpu
                    stopped.set()
            if not stopped.is_set():
                stages, stop = worker.timings(), len(samples)
                cpu_seconds = time.process_time() - cpu
        for one in serving:
            one.result()
    elapsed, audio = samples[stop - 1]
    half = samples[stop // 2]
    later = (audio - half[1]) / (elapsed - half[0]) if stop > 2 else audio / elapsed
    emit("mode", mode)
    emit("x_real_time", round(audio / elapsed, 1))
    emit("x_real_time_second_half", round(later, 1))
    emit("bound_by", bound(stages))
    emit("seconds", round(elapsed, 2))
    emit("audio_seconds", round(audio, 1))
    emit("units_committed", len(results))
    emit("items_encoded", sum(r.encoded for r in results))
    emit("items_failed", sum(r.failed for r in results))
    emit("unit_seconds", round(plan.seconds / len(plan.units), 1))
    emit("whole_corpus", not any(True for _ in units))
    emit("load_threads", threads)
    emit("batch_size", job.settings.batch_size)
    emit("cores_busy", round(cpu_seconds / elapsed, 2))
    emit("read_from_disk_bytes", bytes_read() - read)
    emit("peak_gpu_gib", peak_gib(subject))
    emit("stages", {k: round(v, 3) for k, v in stages.items()})


def bytes_read() -> int:
    """Return the bytes that the system has read from disk for this process."""
    path = Path("/proc/self/io")
    try:
        lines = dict(line.split(": ") for line in path.read_text().splitlines())
    except OSError:
        return 0
    return int(lines.get("read_bytes", 0))


def copy_cold(source: Path, target: Path, most: int) -> Path:
    """Copy distinct files, each with its own blocks, and drop them from the page cache."""
    target.mkdir()
    distinct = [path for path in sorted(source.iterdir()) if path.name.endswith("-0000.flac")]
    copies = ((path, turn) for turn in itertools.count() for path in distinct)
    lock, state, until = threading.Lock(), {"bytes": 0}, time.perf_counter() + COPY_SECONDS
    most = min(most, shutil.disk_usage(target).free // 4)

    def copy(_: int) -> None:
        while True:
            with lock:
                if state["bytes"] > most or time.perf_counter() > until:
                    return
                path, turn = next(copies)
                state["bytes"] += path.stat().st_size
            copied = target / f"{path.stem}-{turn:04d}.flac"
            shutil.copyfile(path, copied)
            with copied.open("rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(copy, range(8)))
    return target


PARTS: dict[str, Callable[..., None]] = {
    "alone": alone,
    "loading": loading,
    "end_to_end": end_to_end,
}


if __name__ == "__main__":
    from gpu_explore import explore

    PARTS["explore"] = explore
    main()
