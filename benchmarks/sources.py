"""Measures the cost of a source without a model: loading, fetching and listing.

    python benchmarks/sources.py [--seconds 60] [--rounds 5] [--latency 0.03] [--objects 300]

`decode` loads audio from memory as latentmill does (open, check, decode, downmix, hash): seconds of
audio per second of CPU time of one thread, and how much faster two threads are than one (wall time,
alternating). Two processes show the limit of the machine. `s3` fetches small objects from moto's
server behind a proxy with latency: with the two load threads of a unit through `UnitReader`, which
prefetches, and with a plain loop over fsspec's `cat_file`. On a busy machine, only the ratios are
meaningful; they are medians of alternating rounds.
"""

from __future__ import annotations

import argparse
import functools
import logging
import multiprocessing
import os
import statistics
import sys
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from common import ROOT, machine, median, write_result

sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests" / "audio")]

FORMATS = ("wav", "flac", "mp3", "vorbis", "opus", "m4a")
RATE = 44100


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=int, default=60, help="length of the recording")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--latency", type=float, default=0.03, help="latency of a response in seconds"
    )
    parser.add_argument("--objects", type=int, default=300, help="number of objects of 200 kB")
    arguments = parser.parse_args()
    print(machine(), flush=True)
    result: dict[str, Any] = {"script": "benchmarks/sources.py", **vars(arguments)}
    result["decode"] = {
        name: decoding(name, arguments.seconds, arguments.rounds) for name in FORMATS
    }
    result["s3"] = s3(arguments.objects, arguments.latency, arguments.rounds)
    write_result("sources", result)


def work(name: str, seconds: int) -> float:
    """Load a recording of a format; returns the CPU seconds of this thread."""
    from latentmill.audio import media_from_bytes, open_audio, prepare

    data, rate = recording(name, seconds)
    began = time.thread_time()
    with media_from_bytes(data) as media:
        waveform = prepare(open_audio(media), sample_rate=rate, channels=1)
        for _block in waveform.blocks():
            pass
        _ = media.content_hash
    return time.thread_time() - began


@functools.cache
def recording(name: str, seconds: int) -> tuple[bytes, int]:
    from audio_files import encoded, rate_of

    return encoded(name, seconds * rate_of(name)), rate_of(name)


def decoding(name: str, seconds: int, rounds: int) -> dict[str, float]:
    files = 4
    cpu: list[float] = []
    speedups: dict[str, list[float]] = {"threads": [], "processes": []}
    with ThreadPoolExecutor(2) as threads, multiprocessing.get_context("spawn").Pool(2) as others:
        tasks = [(name, seconds)] * files
        for number in range(rounds + 1):
            began = time.perf_counter()
            cpu += [work(*task) for task in tasks]
            one = time.perf_counter() - began
            for kind, speedup in speedups.items():
                began = time.perf_counter()
                if kind == "threads":
                    list(threads.map(work, *zip(*tasks, strict=True)))
                else:
                    others.starmap(work, tasks, chunksize=1)
                if number:  # by then, the processes have finished importing
                    speedup.append(one / (time.perf_counter() - began))
    result = {
        "x_real_time_per_core": round(seconds / statistics.median(cpu), 1),
        "two_threads_over_one": median(speedups["threads"]),
        "two_processes_over_one": median(speedups["processes"]),
    }
    print(name, result, flush=True)
    return result


def s3(objects: int, latency: float, rounds: int) -> dict[str, Any]:
    """Measure reads of small objects and a listing, with a slow server."""
    import fsspec
    from moto.server import ThreadedMotoServer

    from latentmill.sources.base import Item
    from latentmill.sources.reading import UnitReader
    from support.faulty_s3 import Faults, faulty_proxy

    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # a line per request
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    names = {
        "AWS_ACCESS_KEY_ID": "x",
        "AWS_SECRET_ACCESS_KEY": "x",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    with faulty_proxy(f"http://{host}:{port}", Faults(latency=latency)) as url:
        os.environ |= {**names, "AWS_ENDPOINT_URL": url}
        s3 = fsspec.filesystem("s3")
        bucket = f"bench-{uuid.uuid4().hex[:8]}"
        s3.mkdir(bucket)
        data = os.urandom(200_000)
        s3.pipe({f"{bucket}/{number}.wav": data for number in range(objects)})
        urls = [f"s3://{bucket}/{number}.wav" for number in range(objects)]
        items = [Item(url, url, len(data), "") for url in urls]

        def plain() -> None:
            for one in urls:
                assert len(s3.cat_file(one)) == len(data)

        def unit() -> None:
            with UnitReader(items) as reader, ThreadPoolExecutor(2) as pool:
                list(pool.map(lambda item: reader.open(item).close(), items))

        def list_all() -> None:
            s3.invalidate_cache()
            assert len(s3.find(bucket)) == objects

        ways = {
            "fsspec_loop": plain,
            "unit": unit,
            "list": list_all,
        }
        times: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(rounds):
            for name, way in ways.items():
                began = time.perf_counter()
                way()
                times[name].append(time.perf_counter() - began)
    server.stop()
    result: dict[str, Any] = {
        f"{n}_per_second": round(objects / median(t)) for n, t in times.items()
    }
    pairs = zip(times["fsspec_loop"], times["unit"], strict=True)
    result["unit_over_loop"] = median([loop / other for loop, other in pairs])
    print(result, flush=True)
    return result


if __name__ == "__main__":
    main()
