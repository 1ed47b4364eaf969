"""Time of fields in one pass with their store, compared with `encode` and then `add`, on music.

    python benchmarks/one_pass.py [--audio FILE ...] [--minutes 20] [--repeats 3] [--results FOLDER]

The recordings are repeated up to the length. The store has coefficients of `mdct` at 44.1 kHz, its
fields those at 16 and 24 kHz. These models take little time, so this shows what one pass saves of
the loading: once for each field. Slower models gain the same seconds. Both ways run in this process
with one worker and two load threads, without Ray, alternately.
"""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
import time
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

from common import RESULTS, median, recordings, write_result
from latentmill.audio import open_audio, open_media
from latentmill.config import load_config
from latentmill.engine import launch
from latentmill.engine.joint import JointWorker, joint_job, joint_units, write_origins
from latentmill.engine.worker import Worker
from latentmill.run.add import run_add
from latentmill.run.run import run
from latentmill.store.store import open_store

FIELDS = {
    f"rate_{rate}": {"model": "mdct", "model_options": {"hop": 320, "sample_rate": rate}}
    for rate in (16_000, 24_000)
}
MACHINE = {"device": "cpu", "threads": 1, "load_threads": 2}


def encode_units(*args: Any) -> None:
    """What `launch.encode_units` does, with one worker of this process."""
    config, handle, chunking, plan, todo, progress, hold, *rest = args
    fields = rest[0] if rest else ()
    job = launch.make_job(config, handle, chunking, plan, device="cpu", threads=1)
    with ExitStack() as stack:
        worker: Any = JointWorker(joint_job(job, fields)) if fields else Worker(job)
        stack.enter_context(closing(worker))
        write_origins(hold, fields, worker.origin() if fields else [worker.origin()])
        for unit in joint_units(todo, fields) if fields else todo:
            progress.unit_done(worker.encode(unit))


def write_corpus(folder: Path, files: list[Path], seconds: float) -> None:
    """Copies of the recordings, one after the other, up to a length."""
    lengths = []
    for file in files:
        with open_media(str(file)) as media, open_audio(media) as stream:
            lengths.append((stream.num_samples or 0) / stream.sample_rate)
    number, total = 0, 0.0
    while total < seconds:
        file = files[number % len(files)]
        shutil.copyfile(file, folder / f"{number:04}{file.suffix}")
        total += lengths[number % len(files)]
        number += 1


def seconds_of(corpus: Path, store: Path, *, one_pass: bool) -> float:
    """The time until the store and its fields are complete."""
    given = {"source": str(corpus), "out": str(store), "model": "mdct", "unit_seconds": 300.0}
    fields = {"with_fields": FIELDS} if one_pass else {}
    began = time.perf_counter()
    run(load_config(None, {**given, **MACHINE, **fields}))
    if not one_pass:
        for name, field in FIELDS.items():
            run_add(str(store), name, {**MACHINE, **field})
    return time.perf_counter() - began


def latents(store: Path) -> dict[tuple[str, str], bytes]:
    roots = [store, *(store / "fields" / name for name in FIELDS)]
    return {(r.name, one.key): one.latent.tobytes() for r in roots for one in open_store(str(r))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--audio", type=Path, nargs="+")
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    launch.encode_units = encode_units
    seconds: dict[bool, list[float]] = {False: [], True: []}
    with tempfile.TemporaryDirectory() as name:
        corpus = Path(name) / "corpus"
        corpus.mkdir()
        write_corpus(corpus, recordings(args.audio), 60 * args.minutes)
        stores = {one_pass: Path(name) / f"{one_pass}" / "store" for one_pass in seconds}
        for _ in range(args.repeats):
            for one_pass, store in stores.items():
                shutil.rmtree(store.parent, ignore_errors=True)
                seconds[one_pass].append(seconds_of(corpus, store, one_pass=one_pass))
        equal = latents(stores[True]) == latents(stores[False])
        stages = open_store(str(stores[True])).commits.values()
        loading = sum(one.timings["decode_seconds"] + one.timings["read_seconds"] for one in stages)
    result = {
        "minutes": args.minutes,
        "fields": len(FIELDS),
        "encode_and_add_seconds": median(seconds[False]),
        "one_pass_seconds": median(seconds[True]),
        "ratio": median(
            [one / two for one, two in zip(seconds[True], seconds[False], strict=True)]
        ),
        "loading_thread_seconds": round(loading, 2),
        "equal": equal,
        "load_average": os.getloadavg()[0],
    }
    write_result("one_pass", result, args.results)


if __name__ == "__main__":
    main()
