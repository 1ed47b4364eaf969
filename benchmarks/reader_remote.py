"""Measures reading from S3 at a latency: crops with and without a cache, and streaming tars.

    python benchmarks/reader_remote.py
    python benchmarks/reader_remote.py --items 400 --rounds 3 --latency 0.03

The objects are written to moto's server, and read from one that answers from memory after the
latency (`object_server.py`), in a process of its own. Ways alternate, and medians of the rounds are
reported:

- crops: `Loader` with 2 workers, without a cache: one request per crop.
- cold cache, warm cache: the same with an empty cache, and again.
- tars: the items of WebDataset tars, streamed whole tar by whole tar with one read ahead, and one
  crop cut from each.
- plain connections: the requests of `crops` from as many open connections, by a client that does
  nothing else.

Of each: crops and requests a second, the client's CPU seconds per request (with its workers), and
the median number of requests in work at the server while there are any.
"""

from __future__ import annotations

import argparse
import asyncio
import io
import logging
import multiprocessing
import os
import shutil
import sys
import tarfile
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Coroutine, Iterable
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from common import RESULTS, ROOT, cpu_seconds, median, write_result
from object_server import ObjectServer
from reader import make_latents
from reader_contenders import CHANNELS, CROP

sys.path.insert(0, str(ROOT / "tests"))
BATCH = 64
WORKERS = 2
CONNECTIONS = 256
SAMPLE_SECONDS = 0.005


def serve(latency: float, pipe: Connection) -> None:
    """Run the servers; for each message but None, send what happened since the last one."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # a line per request
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    written = f"http://{host}:{port}"
    objects, busy = ObjectServer(written), list[int]()

    def sample() -> None:
        while True:
            busy.append(objects.working)
            time.sleep(SAMPLE_SECONDS)

    threading.Thread(target=sample, daemon=True).start()
    pipe.send((written, objects.url))
    while pipe.recv() is not None:
        working = [count for count in busy if count]
        pipe.send((objects.requests, median(working) if working else 0, objects.most))
        objects.latency = latency
        objects.requests = objects.most = 0
        busy.clear()
    server.stop()


class Epochs:
    """Epochs of a `Loader`, whose workers have read one before."""

    def __init__(self, url: str, cache: str | None) -> None:
        import latentmill as lm

        self.cache = cache
        stream = lm.LatentStream(url, crop=CROP, metadata=False, cache=cache)
        self.loader = lm.Loader(stream, BATCH, workers=WORKERS, start_method="fork")
        self()

    def __call__(self) -> int:
        return sum(len(batch["key"]) for batch in self.loader)

    def cold(self) -> int:
        assert self.cache is not None
        for folder in Path(self.cache).iterdir():
            shutil.rmtree(folder)
        return self()


def stream_tars(url: str) -> int:
    """Read one crop of each item of a store of tars; returns the number of crops."""
    import latentmill as lm

    store, crops = lm.open(url), 0
    paths = [shard.path for shard in store.info.shards]
    with ThreadPoolExecutor(1) as pool:
        ahead = pool.submit(store.storage.read, paths[0])
        for following in [*paths[1:], None]:
            data = ahead.result()
            if following is not None:
                ahead = pool.submit(store.storage.read, following)
            with tarfile.open(fileobj=io.BytesIO(data)) as tar:
                for member in tar:
                    file = tar.extractfile(member)
                    if file is not None and member.name.endswith(".npy"):
                        latent = np.load(io.BytesIO(file.read()))
                        start = (crops * 7919) % (latent.shape[1] - CROP + 1)
                        latent[:, start : start + CROP].astype(np.float32)
                        crops += 1
    return crops


class PlainConnections:
    """The requests of one crop per item, from plain connections that have been open before."""

    def __init__(self, server: str, url: str) -> None:
        import fsspec

        import latentmill as lm
        from latentmill.reader.crops import CropReader

        reader = CropReader(lm.open(url))
        rows = np.arange(len(reader.frames))
        self.ranges = reader._ranges(rows, np.zeros_like(rows), np.full_like(rows, CROP))
        folder, s3 = url.removeprefix("s3://"), fsspec.filesystem("s3")
        paths = {shard.path for shard, _, _ in self.ranges}
        self.signed = {p: s3.sign(f"{folder}/{p}", 3600).partition(server)[2] for p in paths}
        place = urlsplit(server)
        self.head = f" HTTP/1.1\r\nHost: {place.netloc}\r\nRange: bytes="
        self.loop = asyncio.new_event_loop()
        connect = (asyncio.open_connection(place.hostname, place.port) for _ in range(CONNECTIONS))
        self.connections = self.loop.run_until_complete(_all(connect))
        self()

    def __call__(self) -> int:
        self.loop.run_until_complete(_all(map(self._fetch, range(CONNECTIONS))))
        return len(self.ranges)

    async def _fetch(self, number: int) -> None:
        reader, writer = self.connections[number]
        for shard, offset, length in self.ranges[number::CONNECTIONS]:
            bounds = f"{offset}-{offset + length - 1}\r\n\r\n"
            writer.write(f"GET {self.signed[shard.path]}{self.head}{bounds}".encode())
            answer = await reader.readuntil(b"\r\n\r\n")
            assert b" 206 " in answer, answer
            await reader.readexactly(length)


async def _all(tasks: Iterable[Coroutine[Any, Any, Any]]) -> list[Any]:
    return await asyncio.gather(*tasks)


def measure(
    ways: dict[str, Callable[[], int]], rounds: int, pipe: Connection, server: int
) -> dict[str, Any]:
    found: dict[str, list[dict[str, float]]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            pipe.send("slow")
            pipe.recv()
            began, used = time.perf_counter(), cpu_seconds(server)
            crops = way()
            seconds, used = time.perf_counter() - began, cpu_seconds(server) - used
            pipe.send("slow")
            requests, in_work, most = pipe.recv()
            found[name].append(
                {
                    "crops_per_second": crops / seconds,
                    "requests": requests,
                    "requests_per_second": requests / seconds,
                    "client_cpu_ms_per_request": 1000 * used / max(1, requests),
                    "client_cpu_ms_per_crop": 1000 * used / crops,
                    "in_work": in_work,
                    "most_in_work": most,
                }
            )
            print(
                name, {key: round(value, 2) for key, value in found[name][-1].items()}, flush=True
            )
    return {
        name: {key: median([one[key] for one in runs]) for key in runs[0]}
        for name, runs in found.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--items", type=int, default=400)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--latency", type=float, default=0.03, help="seconds before an answer")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    here, there = multiprocessing.get_context("spawn").Pipe()
    process = multiprocessing.get_context("spawn").Process(
        target=serve, args=(options.latency, there), daemon=True
    )
    process.start()
    written, server = here.recv()
    os.environ |= {
        "AWS_ACCESS_KEY_ID": "x",
        "AWS_SECRET_ACCESS_KEY": "x",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": written,
    }
    import fsspec

    from support.latent_store import write_latents

    bucket = f"bench-{uuid.uuid4().hex[:8]}"
    fsspec.filesystem("s3").mkdir(bucket)
    latents = make_latents(options.items)
    lengths = [len(latent) for latent in latents]
    urls = {name: f"s3://{bucket}/{name}" for name in ("parquet", "webdataset")}
    client = os.environ.get("LATENTMILL_OBSTORE", "1")
    os.environ["LATENTMILL_OBSTORE"] = "0"  # not before the workers are forked
    for name, url in urls.items():
        print(f"writing {name}", flush=True)
        write_latents(
            url,
            lengths,
            channels=CHANNELS,
            per_unit=100,
            format_name=name,
            latents=[z.T for z in latents],
        )
    os.environ |= {"LATENTMILL_OBSTORE": client, "AWS_ENDPOINT_URL": server}
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    with tempfile.TemporaryDirectory() as folder:
        plain = Epochs(urls["parquet"], None)
        cached = Epochs(urls["parquet"], folder)
        ways = {
            "crops": plain,
            "cold cache": cached.cold,
            "warm cache": cached,
            "tars": lambda: stream_tars(urls["webdataset"]),
            "plain connections": PlainConnections(server, urls["parquet"]),
        }
        found = measure(ways, options.rounds, here, process.pid or 0)
    here.send(None)
    process.join()
    result = {
        "items": options.items,
        "latency_seconds": options.latency,
        "obstore": client != "0",
        "batch": BATCH,
        "workers": WORKERS,
        "rounds": options.rounds,
        "load": [round(load, 1) for load in os.getloadavg()],
        "ways": found,
        "cold_cache_over_tars": round(
            found["cold cache"]["crops_per_second"] / found["tars"]["crops_per_second"], 2
        ),
    }
    write_result("reader_remote", result, options.results)


if __name__ == "__main__":
    main()
