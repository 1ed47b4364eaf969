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
from pathlib import Path
from typing import Any

import numpy as np

import synthetic
from common import RESULTS, write_result
from latentmill.config import RunConfig, fingerprint_document
from latentmill.encoding.chunks import Chunking
from latentmill.models import registry
from latentmill.record import Record
from latentmill.sources.base import Item
from synthetic import copied, record

PER_UNIT = 500


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
    """Ten spectra; of each thousand records, the last is almost a copy of the first."""
    spec = registry.resolve("mdct", {}).spec
    config = RunConfig(source="/music", out=url, model="mdct")
    samples = round(seconds * spec.sample_rate)
    frames, channels = spec.frames(samples), np.arange(spec.latent_channels)[:, None]

    def made(item: Item) -> Record:
        number = int(item.key)
        like = copied(number)
        spectrum = 0.3 * np.exp(-channels / (20 + 20 * (like % 10)))
        noise = np.random.default_rng(like).standard_normal((len(channels), frames), np.float32)
        latent = spectrum * noise * (1 if like == number else 0.99)
        own = {"spectrum": f"spectrum {like % 10}", "number": number}
        half = latent.astype(np.float16)
        return record(item, number, half, samples=samples, rate=spec.sample_rate, own=own)

    keys = (f"{n:06d}" for n in range(records))
    document = fingerprint_document(config, spec, Chunking.for_model(spec))
    synthetic.write_store(url, keys, made, document, per_unit=PER_UNIT)


if __name__ == "__main__":
    main()
