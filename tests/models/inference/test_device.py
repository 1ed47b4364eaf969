"""A device that was asked for is taken or refused, never replaced."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch

from latentmill.errors import ConfigError
from latentmill.models.inference.device import KEEP_FREED_MEMORY, pick_device, worker_environment


def test_auto_takes_a_gpu_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert pick_device("auto") == "cuda"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert pick_device("auto") == "cpu"
    assert pick_device("cpu") == "cpu"


@pytest.mark.parametrize(("gpus", "refused"), [(0, "cuda"), (0, "cuda:0"), (2, "cuda:2")])
def test_a_gpu_that_is_not_there_is_refused(
    gpus: int,
    refused: str,
    monkeypatch: pytest.MonkeyPatch,
    one_sentence: Callable[[BaseException], str],
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    with pytest.raises(ConfigError) as caught:
        pick_device(refused)
    assert f"{gpus} GPUs" in one_sentence(caught.value)
    assert gpus == 0 or pick_device("cuda:1") == "cuda:1"


@pytest.mark.parametrize("wanted", ["", "gpu", "CPU", "cuda:x", "cuda:-1", "meta", "mps"])
def test_what_is_no_device_is_refused(
    wanted: str, one_sentence: Callable[[BaseException], str]
) -> None:
    with pytest.raises(ConfigError) as caught:
        pick_device(wanted)
    assert "auto, cpu, cuda" in one_sentence(caught.value)


SCRIPT = """
import resource, threading
import numpy as np

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    np.ones(70_000_000, np.uint8)  # more than an arena beside the main one can hold
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

thread = threading.Thread(target=lambda: print([faults() for _ in range(3)][1:]))
thread.start()
thread.join()
"""


def page_faults(variables: dict[str, str]) -> list[int]:
    """Fresh pages that an array takes each time, after one of its size was freed."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    command = [sys.executable, "-c", SCRIPT]
    done = subprocess.run(
        command, env={**env, **variables}, check=True, capture_output=True, text=True, timeout=120
    )
    pages: list[int] = json.loads(done.stdout)
    return pages


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="is about glibc")
def test_freed_memory_is_kept_for_the_next_tensor() -> None:
    all_anew = 70_000_000 // 2**21  # the least, if all pages are huge ones
    assert min(page_faults({})) >= all_anew
    assert max(page_faults(KEEP_FREED_MEMORY)) < all_anew
    many_arenas = {n: v for n, v in KEEP_FREED_MEMORY.items() if n != "MALLOC_ARENA_MAX"}
    assert min(page_faults(many_arenas)) >= all_anew


TRIM = """
import torch
from latentmill.models.inference.device import trim_memory

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096

small = [torch.ones(30_000_000, dtype=torch.uint8), torch.ones(1000)]  # which stays, behind it
del small[0]
before = resident()
print(trim_memory(), before - resident())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="is about glibc")
@pytest.mark.parametrize("kept", [pytest.param(True, marks=pytest.mark.slow), False])
def test_kept_memory_can_be_given_back(kept: bool) -> None:
    env = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    done = subprocess.run(
        [sys.executable, "-c", TRIM],
        env={**env, **(KEEP_FREED_MEMORY if kept else {})},
        check=True,
        capture_output=True,
        text=True,
        timeout=300,
    )
    trimmed, freed = done.stdout.split()
    assert trimmed == str(kept)
    assert (int(freed) > 25_000_000) == kept


def test_what_the_user_set_of_malloc_stays() -> None:
    assert worker_environment({}) == KEEP_FREED_MEMORY
    left = worker_environment({"MALLOC_ARENA_MAX": "4", "HOME": "/"})
    assert left == {n: v for n, v in KEEP_FREED_MEMORY.items() if n != "MALLOC_ARENA_MAX"}


MIXED = """
import random, torch
from latentmill.models.inference.device_pipeline import DevicePipeline

torch.set_num_threads(1)
torch.manual_seed(0)

def resident(field):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(field)) / 1024

class Stack:  # activations as an encoder has them: large, and of sizes by the chunk's length
    layers = [torch.nn.Conv1d(a, b, 3, padding=1) for a, b in ((1, 48), (48, 96), (96, 8))]

    @torch.inference_mode()
    def encode(self, audio):
        for layer in self.layers:
            audio = torch.nn.functional.silu(layer(audio))
        return audio[..., ::64]

rng = random.Random(0)
lengths = [rng.randrange(20_000, 100_000) for _ in range(44)]
before = resident("VmRSS")
pipeline = DevicePipeline(Stack())
one = torch.zeros(1, 1, max(lengths)).numpy()
list(pipeline.push(one))
single = resident("VmHWM") - before
for length in lengths:
    list(pipeline.push(torch.zeros(1, 1, length).numpy()))
print(single, resident("VmRSS") - before, resident("VmHWM") - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="is about glibc")
def test_chunks_of_mixed_lengths_do_not_pile_up_memory() -> None:
    env = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    done = subprocess.run(
        [sys.executable, "-c", MIXED],
        env={**env, **KEEP_FREED_MEMORY},
        check=True,
        capture_output=True,
        text=True,
        timeout=300,
    )
    single, after, _ = map(float, done.stdout.split())
    assert single > 30  # MiB: more than the noise of an interpreter
    assert after < 3 * single  # without trimming it is 4 to 6 times
