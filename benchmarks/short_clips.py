"""Computes the batches that short clips are packed into, with the real plan and packer.

    python benchmarks/short_clips.py [--results FOLDER]

Corpora of 100 and 10,000 hours of clips whose lengths are drawn from three distributions, with the
lengths and chunks of lin-cae at 44.1 kHz and full batches of 32 chunks of 10 s. Nothing is loaded.
The units of 100 hours are those of a complete plan. Of 10,000 hours, the units of one span (see
`plan/drafting.py`) are computed, with the limits of the whole corpus; all spans are alike.

- `in_long_batches`: share of the audio in batches of 50 s or more
- `median_batch_seconds`: half of the audio is in longer batches
- `shapes_per_1000_batches`: distinct pairs of rows and samples
- `items_per_second`: clips that one thread orders and packs
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from common import write_result
from latentmill.encoding.batches import LONG_BATCH_SECONDS, expected_batches
from latentmill.encoding.chunks import Chunking
from latentmill.models.families.linear_cae.model import consistency_spec
from latentmill.plan import UnitLimits, draft
from latentmill.plan.drafting import SPAN_SECONDS
from latentmill.plan.items import estimated_seconds
from latentmill.sources.base import Item

HOURS = (100, 10_000)
BATCH = 32
CHUNK_SECONDS = 10.0
BYTES_PER_SECOND = 1400.0  # of lin-cae's latents

Lengths = Callable[[np.random.Generator, int], np.ndarray]
MIXES: dict[str, Lengths] = {
    "1 to 10 s": lambda random, n: random.uniform(1, 10, n),
    "speech": lambda random, n: np.clip(random.lognormal(np.log(6), 0.6, n), 0.5, 35),
    "effects": lambda random, n: np.clip(random.lognormal(np.log(2), 1.0, n), 0.1, 120),
}


def clips(lengths: Lengths, hours: float) -> list[Item]:
    """Items of a corpus; their names say nothing of their lengths."""
    random = np.random.default_rng(0)
    mean = lengths(random, 100_000).mean()
    seconds = lengths(random, round(hours * 3600 / mean))
    return [Item(f"{n:09}", f"/{n}.wav", 1, "", seconds=one) for n, one in enumerate(seconds)]


def measured(lengths: Lengths, hours: int) -> dict[str, Any]:
    spec = consistency_spec(
        "lin-cae",
        sample_rate=44100,
        hop_size=512,
        frame_length=2048,
        halvings=3,
        latent_channels=64,
        scale_factor=1.0,
        identity={},
        provenance={},
    )
    chunking = Chunking.for_model(spec, seconds=CHUNK_SECONDS)
    limit = UnitLimits().micros(hours * 3600 * 10**6) / 1e6
    limits = UnitLimits(
        limit, 1 << 30, BYTES_PER_SECOND, chunk_seconds=chunking.samples / spec.sample_rate
    )
    items = clips(lengths, min(hours, SPAN_SECONDS / 3600) if hours > HOURS[0] else hours)
    by_key = {item.key: item for item in items}
    with draft(items, limits) as drafted:
        keys = itertools.chain.from_iterable(t["key"].to_pylist() for t in drafted.tables())
        units = [[by_key[next(keys)] for _ in range(size.items)] for size in drafted.sizes]
    began = time.perf_counter()
    batches = [
        batch
        for unit in units
        for batch in expected_batches(unit, estimated_seconds, spec, chunking, BATCH)
    ]
    taken = time.perf_counter() - began
    seconds = np.sort([rows * samples / spec.sample_rate for rows, samples in batches])
    total = seconds.sum()
    return {
        "units": len(units),
        "items": len(items),
        "in_long_batches": round(seconds[seconds >= LONG_BATCH_SECONDS].sum() / total, 3),
        "median_batch_seconds": round(seconds[np.searchsorted(seconds.cumsum(), total / 2)], 1),
        "batches": len(batches),
        "shapes_per_1000_batches": round(1000 * len(set(batches)) / len(batches)),
        "items_per_second": round(len(items) / taken),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path)
    arguments = parser.parse_args()
    result: dict[str, Any] = {"script": "benchmarks/short_clips.py", "chunks_per_batch": BATCH}
    for hours in HOURS:
        for name, lengths in MIXES.items():
            label = f"{name}, {hours:,} h"
            result[label] = measured(lengths, hours)
            print(label, result[label], flush=True)
    write_result("short_clips", result, *([arguments.results] if arguments.results else []))


if __name__ == "__main__":
    main()
