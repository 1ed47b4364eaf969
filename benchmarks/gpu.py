"""Measures models on a GPU: alone, and end to end from FLAC files to committed shards.

    python benchmarks/gpu.py [--budget 360] [--models same-s lin-cae] [--audio FOLDER] [--explore]

The models have random weights, the real classes and the published sizes. The corpus is true stereo
FLAC of mixed lengths, from recordings (--audio, or ../shared/audio) or synthesised (--audio
synthesised). Most of its files are hard links, so that it fits into the page cache; it is read
before timing starts. Runs without Ray.

`alone` encodes full batches from memory in every numeric mode, with the deviation from float32.
`loading` loads the corpus on the same cores without a model. `end_to_end` is a worker: it loads,
encodes, writes Parquet and commits, two units at a time. `cold` is the same with files that were
dropped from the page cache. --explore times variants of lin-cae's and SAME's encoders.

Each model has its own process; all are prepared in parallel and measured one at a time. All parts
share one time budget. A part that fails or times out is recorded, and the next part starts.
gpu.json is written after every result.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from common import RESULTS, SHARED_AUDIO, machine
from gpu_corpus import SYNTHESISED, write_corpus
from gpu_model import MODELS

# Without bf16 instructions, a CPU takes minutes for what takes seconds in float32.
MODES = {"cpu": ["float32"], "cuda": ["float32", "tf32", "bf16", "fp16"]}
PACKAGES = ("torch", "triton", "numpy", "transformers", "diffusers", "linear-cae", "soundfile")
MODEL_SCRIPT = Path(__file__).with_name("gpu_model.py")
PARTS = ("alone", "loading", "end_to_end", "cold")
EXPLORED = ("lin-cae", "same-s")
GPU_FIGURES = ("clocks.sm", "clocks.mem", "power.draw", "utilization.gpu", "memory.used")
MAX_LOAD_THREADS = 16  # the library's default maximum
COLD_BYTES = {"full": 6 << 30, "tiny": 1 << 20}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--size", choices=("full", "tiny"), default="full")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument(
        "--parts",
        nargs="+",
        choices=PARTS,
        default=PARTS,
    )
    parser.add_argument("--audio", help="folder of recordings, or 'synthesised'")
    parser.add_argument("--budget", type=float, default=360, help="seconds in total")
    parser.add_argument("--seconds-alone", type=float, default=10, help="maximum seconds per model")
    parser.add_argument(
        "--seconds-end-to-end", type=float, default=60, help="maximum seconds per part"
    )
    parser.add_argument(
        "--grace", type=float, default=30, help="extra seconds before a part is stopped"
    )
    parser.add_argument("--explore", action="store_true", help="also time variants of two encoders")
    parser.add_argument(
        "--seconds-explore", type=float, default=45, help="maximum seconds per encoder"
    )
    parser.add_argument("--chunk-seconds", type=float, help="default: each model's own")
    parser.add_argument("--batch-size", type=int, help="chunks; default: found by trial")
    parser.add_argument("--load-threads", type=int)
    parser.add_argument("--distinct", type=int, default=64, help="number of distinct files")
    parser.add_argument("--shortest", type=float, default=3, help="seconds of the shortest file")
    parser.add_argument("--longest", type=float, default=1200)
    parser.add_argument("--hours", type=float, default=200, help="total hours of all files")
    parser.add_argument("--folder", type=Path, help="folder for the corpus and the stores")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of gpu.json")
    arguments = parser.parse_args()
    import torch

    on_gpu = arguments.device.startswith("cuda")
    if on_gpu and not torch.cuda.is_available():
        print("No GPU found, nothing was measured; try --device cpu --size tiny.")
        return
    if arguments.audio is None:
        arguments.audio = str(SHARED_AUDIO) if SHARED_AUDIO.is_dir() else SYNTHESISED
    if arguments.audio != SYNTHESISED and not Path(arguments.audio).is_dir():
        parser.error(f"{arguments.audio} is not a folder: use --audio {SYNTHESISED}")
    if arguments.load_threads is None:
        arguments.load_threads = min(MAX_LOAD_THREADS, os.cpu_count() or 1)
    Run(arguments, "cuda" if on_gpu else "cpu").run()


@dataclass
class Part:
    """One measurement.

    Attributes:
        model: Name of the model.
        name: Name in the results.
        ask: The request to the model's process, without the seconds.
        seconds: Maximum time.
        overhead: Rough additional time in seconds.
    """

    model: str
    name: str
    ask: dict[str, Any]
    seconds: float
    overhead: float = 3.0


def parts_of(arguments: Any, kind: str) -> list[Part]:
    """Return all parts, the most important first because the budget may not suffice for all."""
    modes, threads = MODES[kind], arguments.load_threads
    default = "tf32" if kind == "cuda" else "float32"  # the library's default
    end = {"part": "end_to_end", "threads": threads}
    alone, whole = arguments.seconds_alone, arguments.seconds_end_to_end
    first = [
        Part(m, "alone", {"part": "alone", "modes": modes}, alone, 8.0) for m in arguments.models
    ]
    for model in arguments.models:
        ask = {"part": "loading", "threads": threads}
        first.append(Part(model, "loading", ask, min(4.0, whole)))
    warm = {m: Part(m, f"end_to_end, {default}", {**end, "mode": default}, whole) for m in MODELS}
    cold = {**end, "mode": default, "cold_bytes": COLD_BYTES[arguments.size]}
    explored = [
        Part(m, "explore", {"part": "explore", "modes": modes}, arguments.seconds_explore)
        for m in EXPLORED
        if arguments.explore
    ]
    rest = [
        warm["same-s"],
        warm["lin-cae"],
        *[
            Part("same-s", f"end_to_end, {mode}", {**end, "mode": mode}, whole / 2)
            for mode in modes
            if mode == "bf16"
        ],
        Part("same-s", f"cold, {default}", cold, whole / 4, 12.0),
        *explored,
        warm["mimi"],
        warm["oobleck"],
        warm["same-l"],
    ]
    wanted = [*arguments.parts, *(["explore"] if arguments.explore else [])]
    return [
        part
        for part in [*first, *rest]
        if part.model in arguments.models and part.name.partition(",")[0] in wanted
    ]


@dataclass
class Run:
    """One run of the benchmark: its processes, budget and result."""

    arguments: Any
    kind: str
    began: float = field(default_factory=time.perf_counter)
    result: dict[str, Any] = field(default_factory=dict)

    def run(self) -> None:
        """Run all parts."""
        arguments = self.arguments
        self.result = {
            "machine": machine(),
            "script": "benchmarks/gpu.py",
            "command": "python " + " ".join(["benchmarks/gpu.py", *self._options()]),
            "device": arguments.device,
            "weights": f"random, of the real classes, {arguments.size} size",
            "versions": versions(),
            "models": {name: {} for name in arguments.models},
        }
        with ExitStack() as stack:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=arguments.folder)))
            monitor = stack.enter_context(Monitor()) if self.kind == "cuda" else None
            children = {
                name: stack.enter_context(Child(self._settings(name, folder)))
                for name in arguments.models
            }
            self._write_corpus(folder / "flac")
            for name, child in children.items():
                self._collect(child, name, "model", self._left() + arguments.grace)
            self._note("prepared_seconds", round(time.perf_counter() - self.began, 1))
            parts = parts_of(arguments, self.kind)
            for number, part in enumerate(parts):
                self._measure(part, children[part.model], parts[number:], monitor)
        self._note("seconds", round(time.perf_counter() - self.began, 1))
        print(f"written to {self._path()}")

    def _options(self) -> list[str]:
        """The command-line options without local paths."""
        given, hidden = sys.argv[1:], ("--results", "--folder")
        options = []
        for number, option in enumerate(given):
            if option not in hidden and (number == 0 or given[number - 1] not in hidden):
                options.append("FOLDER" if "/" in option else option)
        return options

    def _settings(self, name: str, folder: Path) -> dict[str, Any]:
        arguments = self.arguments
        return {
            "model": name,
            "device": arguments.device,
            "size": arguments.size,
            "folder": str(folder),
            "corpus": str(folder / "flac"),
            "batch_size": arguments.batch_size,
            "chunk_seconds": arguments.chunk_seconds,
        }

    def _write_corpus(self, folder: Path) -> None:
        arguments, began = self.arguments, time.perf_counter()
        corpus = write_corpus(
            folder,
            None if arguments.audio == SYNTHESISED else Path(arguments.audio),
            distinct=arguments.distinct,
            shortest=arguments.shortest,
            longest=arguments.longest,
            hours=arguments.hours,
            threads=os.cpu_count() or 1,
        )
        for path in folder.iterdir():
            if path.name.endswith("-0000.flac"):
                path.read_bytes()  # fills the page cache
        written = round(time.perf_counter() - began, 1)
        self._note("corpus", {**corpus.document(), "seconds_to_write": written})

    def _left(self) -> float:
        return float(self.arguments.budget - (time.perf_counter() - self.began))

    def _measure(self, part: Part, child: Child, left: list[Part], monitor: Monitor | None) -> None:
        """Run one part within its share of the remaining budget."""
        wanted = sum(one.seconds for one in left)
        share = min(1.0, (self._left() - sum(one.overhead for one in left)) / wanted)
        seconds = part.seconds * max(share, 0.0)
        figures = self.result["models"][part.model].setdefault(part.name, {})
        if self._left() <= 0 or child.dead:
            figures["error"] = "the process had ended" if child.dead else "the budget was used up"
            self._write()
            return
        began = time.perf_counter()
        child.ask({**part.ask, "seconds": max(seconds, 0.1 * part.seconds)})
        self._collect(child, part.model, part.name, seconds + self.arguments.grace)
        figures["part_seconds"] = round(time.perf_counter() - began, 1)
        if monitor is not None:
            figures["gpu"] = monitor.figures(began)
        self._write()
        shown = {k: v for k, v in figures.items() if k not in ("stages", "gpu")}
        text = json.dumps(shown)
        print(f"{part.model}: {part.name}: {text[:1500]}", flush=True)

    def _collect(self, child: Child, model: str, name: str, limit: float) -> None:
        """Collect the figures that a process sends until it reports that the part is done."""
        figures = self.result["models"][model].setdefault(name, {})
        until = time.perf_counter() + limit
        while True:
            try:
                line = child.lines.get(timeout=max(0.0, until - time.perf_counter()))
            except queue.Empty:
                figures["error"] = f"stopped after {limit:.0f} s"
                child.kill()
                break
            if line is None:
                figures.setdefault("error", "the process ended")
                child.dead = True
                break
            if line["key"] == "end":
                break
            if line["key"] != "started":
                figures[line["key"]] = line["value"]
                self._write()
        self._write()

    def _note(self, key: str, value: Any) -> None:
        self.result[key] = value
        self._write()

    def _path(self) -> Path:
        return Path(self.arguments.results) / "gpu.json"

    def _write(self) -> None:
        path = self._path()
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(self.result, indent=2) + "\n")


class Child:
    """The process of a model; leaving the context ends it."""

    def __init__(
        self,
        settings: dict[str, Any],
        script: Path = MODEL_SCRIPT,
    ) -> None:
        self._process = subprocess.Popen(
            [sys.executable, str(script), json.dumps(settings)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.lines: queue.Queue[dict[str, Any] | None] = queue.Queue()
        self.dead = False
        self._listener = threading.Thread(target=self._open_audio_of, daemon=True)
        self._listener.start()

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *error: object) -> None:
        self.kill()

    def ask(self, part: dict[str, Any]) -> None:
        """Start a part; if the process is dead, collecting its figures reports that."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(part) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            return

    def kill(self) -> None:
        """Kill the process."""
        self.dead = True
        self._process.kill()
        self._process.wait()
        self._listener.join()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with suppress(BrokenPipeError):  # requests that it has not read
                    pipe.close()

    def _open_audio_of(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self.lines.put(json.loads(line))
        self.lines.put(None)


class Monitor:
    """Samples clocks, power and load of the GPU twice a second with nvidia-smi."""

    def __init__(self) -> None:
        self._samples: list[tuple[float, list[float]]] = []
        query = f"--query-gpu={','.join(GPU_FIGURES)}"
        command = ["nvidia-smi", query, "--format=csv,noheader,nounits", "-lms", "500", "-i", "0"]
        try:
            self._process: subprocess.Popen[str] | None = subprocess.Popen(
                command, stdout=subprocess.PIPE, text=True
            )
        except FileNotFoundError:
            self._process = None
            return
        threading.Thread(target=self._open_audio_of, daemon=True).start()

    def __enter__(self) -> Monitor:
        return self

    def __exit__(self, *error: object) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def figures(self, since: float) -> dict[str, list[float]]:
        """Return minimum, median and maximum of each figure since a time."""
        taken = [values for at, values in self._samples if at >= since]
        if not taken:
            return {}
        return {
            name: [min(column), round(statistics.median(column), 1), max(column)]
            for name, column in zip(GPU_FIGURES, zip(*taken, strict=True), strict=True)
        }

    def _open_audio_of(self) -> None:
        assert self._process is not None and self._process.stdout is not None
        for line in self._process.stdout:
            try:
                values = [float(cell) for cell in line.split(",")]
            except ValueError:  # this driver does not report the figure
                continue
            self._samples.append((time.perf_counter(), values))


def versions() -> dict[str, str]:
    """Return the versions of the software that the results depend on."""
    import soundfile
    import torch

    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    found["libsndfile"] = soundfile.__libsndfile_version__
    if torch.cuda.is_available():
        found["cuda"] = torch.version.cuda or ""
        found["cudnn"] = str(torch.backends.cudnn.version())
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        try:
            driver = subprocess.run(command, capture_output=True, text=True, check=False).stdout
            found["driver"] = driver.splitlines()[0] if driver else ""
        except FileNotFoundError:
            pass
    return found


if __name__ == "__main__":
    main()
