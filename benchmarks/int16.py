"""Compares the cost of detecting 16-bit samples with the cost of copying float32.

    python benchmarks/int16.py [--seconds 60] [--rounds 9]

Samples could be sent to a GPU as 16 bits if that loses nothing. `check_and_convert` converts a
batch of multiples of 1/32768 and checks that all of them are; `copy` copies it into existing
memory, as into page-locked memory. One thread, CPU microseconds per second of 44.1 kHz mono.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import torch

from common import RESULTS, median, write_result

RATE = 44100


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=int, default=60, help="length of the batch in seconds")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    samples = torch.randint(-(2**15), 2**15, (arguments.seconds * RATE,)).float() / 2**15
    there = torch.empty_like(samples)
    scaled, whole = torch.empty_like(samples), torch.empty(len(samples), dtype=torch.int16)

    def check_and_convert() -> None:
        torch.mul(samples, 2**15, out=scaled)
        whole.copy_(scaled)
        assert torch.equal(there.copy_(whole), scaled)

    ways: dict[str, Callable[[], object]] = {
        "check_and_convert": check_and_convert,
        "copy": lambda: there.copy_(samples),
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(arguments.rounds + 1):
        for name, way in ways.items():
            began = time.thread_time()
            way()
            if number:
                times[name].append((time.thread_time() - began) / arguments.seconds * 1e6)
    result = {name: round(median(some)) for name, some in times.items()}
    write_result(
        "int16",
        {"script": "benchmarks/int16.py", "us_per_second_of_audio": result},
        arguments.results,
    )


if __name__ == "__main__":
    main()
