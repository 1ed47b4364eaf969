"""Shared by the benchmarks: a description of the machine, JSON results, random weights."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from latentmill.models.base import ModelSpec

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results"
SHARED_AUDIO = ROOT.parent / "shared" / "audio"
MUSIC = ("Hungarian*.ogg", "Karissa*.ogg", "Kevin*.ogg")  # in its folder ogg/; the rest is speech


def machine() -> str:
    """Describe the machine in one line."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        model = names[0].split(":", 1)[1].strip() if names else model
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    gpu, ray = "", "no ray"
    with suppress(PackageNotFoundError):
        ray = f"ray {version('ray')}"
    import torch

    if torch.cuda.is_available():
        gpu = f", {torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    return (
        f"{os.cpu_count()} cores of {model}, {memory:.0f} GiB of memory{gpu}, "
        f"{platform.system()}, Python {platform.python_version()}, torch {torch.__version__}, "
        f"{ray}; virtual machine on shared hardware"
    )


def write_result(name: str, result: dict[str, Any], folder: Path = RESULTS) -> Path:
    """Write a result as JSON, by default beside the script, and print it."""
    folder.mkdir(exist_ok=True)
    path = folder / f"{name}.json"
    path.write_text(json.dumps({"machine": machine(), **result}, indent=2) + "\n")
    print(json.dumps(result, indent=2))
    print(f"written to {path}")
    return path


def recordings(audio: list[Path] | None) -> list[Path]:
    """The files, or the music of the shared audio: noise and tones understate errors."""
    found = audio or [path for glob in MUSIC for path in sorted((SHARED_AUDIO / "ogg").glob(glob))]
    if not found:
        raise SystemExit(f"no music in {SHARED_AUDIO / 'ogg'}: give recordings with --audio FILE")
    return found


def excerpt(file: Path, spec: ModelSpec, samples: int) -> Tensor:
    """Audio `[1, C, samples]` of a recording as a run loads it, from the middle, at a peak of 0.95.

    A recording that is too short is repeated.
    """
    import torch

    from latentmill.audio import open_audio, open_media, prepare

    with open_media(str(file)) as media:
        stream = prepare(
            open_audio(media), sample_rate=spec.sample_rate, channels=spec.channels
        ).blocks()
        audio = torch.cat([torch.from_numpy(block) for block in stream], dim=1)
    audio = audio.repeat(1, -(-samples // audio.shape[1]))
    start = (audio.shape[1] - samples) // 2
    audio = audio[:, start : start + samples]
    return 0.95 * audio[None] / audio.abs().max()


def median(values: list[float]) -> float:
    return round(statistics.median(values), 4)


def cpu_seconds(other: int = 0) -> float:
    """CPU time of this process and its descendants, except the child `other`."""
    ticks, tree = 0, [os.getpid()]
    while tree:
        pid = tree.pop()
        stat = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(stat[11]) + int(stat[12])
        for children in Path(f"/proc/{pid}/task").glob("*/children"):
            tree += [int(child) for child in children.read_text().split() if int(child) != other]
    return ticks / os.sysconf("SC_CLK_TCK")


@contextmanager
def random_linear_cae(size: str, names: Sequence[str] = ("lin-cae",)) -> Iterator[Path]:
    """Make a Hugging Face cache with random weights of the real lin-cae classes, set in os.environ.

    Enter this context before huggingface_hub is imported.
    """
    assert "huggingface_hub" not in sys.modules, "huggingface_hub reads HF_HOME when it is imported"
    with tempfile.TemporaryDirectory() as folder:
        script = ROOT / "tests" / "support" / "linear_cae_weights.py"
        command = [sys.executable, script, folder, "--size", size, "--name", *names]
        subprocess.run(command, check=True)
        os.environ |= {"HF_HOME": folder, "HF_HUB_OFFLINE": "1"}
        yield Path(folder)
