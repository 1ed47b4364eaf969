"""Measures time and memory of `latentmill report` for a store of many records with mdct.

    python benchmarks/report.py [--records 10000] [--seconds 1] [--folder DIR]

A store of synthetic records is written with the library's own writers: mdct latents of coloured
noise in ten clusters, one record in a thousand almost a copy of another. Its statistics are
measured first. The report is written in a process of its own; its peak memory is that of the whole
process, of which Python, torch and Arrow are about 300 MiB. The records have no source audio, so
that every sound of the page is decoded.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from common import RESULTS, write_result
from latentmill.config import RunConfig, fingerprint_document
from latentmill.encoding.chunks import Chunking
from latentmill.encoding.fingerprint import fingerprint
from latentmill.models import registry
from latentmill.plan import Plan, UnitLimits, draft, freeze, read_items
from latentmill.record import Outcome, Record
from latentmill.sources.base import Item
from latentmill.storage.storage import Storage
from latentmill.store.commit import write_commit, write_unit
from latentmill.store.seal import seal, write_origin

PER_UNIT, COPIES = 500, 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--records", type=int, default=10_000)
    parser.add_argument("--seconds", type=float, default=1.0)
    parser.add_argument("--folder", type=Path, help="where the store is written, then removed")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--one", help=argparse.SUPPRESS)  # a folder with a store, in a process
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(measure(Path(arguments.one))))
        return
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        write_store(f"{folder}/store", arguments.records, arguments.seconds)
        from latentmill.evaluation.statistics import measure_statistics
        from latentmill.store.store import open_store

        measure_statistics(open_store(f"{folder}/store"), items=1)
        command = [sys.executable, __file__, "--one", folder]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    facts = {"records": arguments.records, "seconds_each": arguments.seconds}
    write_result("report", {**facts, **json.loads(done.stdout)}, arguments.results)


def measure(folder: Path) -> dict[str, Any]:
    from latentmill.reporting.report import report
    from latentmill.store.store import open_store

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start, cpu = time.perf_counter(), time.process_time()
    written = report(open_store(folder / "store"), folder / "report.html")
    return {
        "seconds": round(time.perf_counter() - start, 1),
        "cpu_seconds": round(time.process_time() - cpu, 1),
        "rss_before_mib": before // 1024,
        "peak_rss_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        "page_bytes": written.bytes,
        "players": written.players,
    }


def write_store(url: str, records: int, seconds: float) -> None:
    config = RunConfig(source="/music", out=url, model="mdct")
    spec = registry.resolve("mdct", {}).spec
    chunking = Chunking.for_model(spec)
    document = fingerprint_document(config, spec, chunking)
    items = (Item(f"{n:06d}", f"/music/{n:06d}.wav", 1, "1", seconds=1.0) for n in range(records))
    storage = Storage(url)
    with draft(items, UnitLimits(unit_seconds=PER_UNIT)) as drafted:
        plan = freeze(Plan("/music", document, "mdct", {}, "parquet", {}), drafted, storage)
    write_origin(
        storage, np.zeros((spec.latent_channels, chunking.samples // spec.hop), np.float32)
    )
    samples = round(seconds * spec.sample_rate)
    for unit in plan.units:
        commit = write_unit(
            storage,
            unit.name,
            outcomes(read_items(storage, unit), spec.frames(samples), samples, spec.sample_rate),
            format_name="parquet",
            fingerprint=fingerprint(document),
            info={"model": document["model"], "dtype": "float16"},
        )
        write_commit(storage, commit, {"total_seconds": 1.0, "model_seconds": 1.0})
    seal(storage, plan)


def outcomes(items: Any, frames: int, samples: int, rate: int) -> Iterator[Outcome]:
    """Ten spectra; of each thousand records, the last is almost a copy of the first."""
    channels = np.arange(512)[:, None]
    for item in items:
        number = int(item.key)
        made = number - COPIES + 1 if number % COPIES == COPIES - 1 else number
        spectrum = 0.3 * np.exp(-channels / (20 + 20 * (made % 10)))
        noise = np.random.default_rng(made).standard_normal((512, frames), np.float32)
        latent = spectrum * noise * (1 if made == number else 0.99)
        record = Record(
            key=item.key,
            latent=latent.astype(np.float16),
            num_samples=samples,
            sample_rate=rate,
            source_uri=item.uri,
            source_sample_rate=rate,
            source_channels=1,
            content_hash=f"xxh3:{number:032x}",
            rms=0.05 + number * 4e-7,
            peak=0.5,
            levels=bytes([200]) * frames,
            metadata={"spectrum": f"spectrum {made % 10}", "number": number},
        )
        yield Outcome(item.key, "encoded", record=record)


if __name__ == "__main__":
    main()
