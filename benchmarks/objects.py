"""Measures reading many small S3 objects and ranges at a latency, with obstore and with s3fs.

    python benchmarks/objects.py
    python benchmarks/objects.py --objects 2000 --bytes 200000 --latency 0.03 --rounds 5

The server answers any name with the same bytes after the latency, from a process of its own. Ways
alternate, and medians of the rounds are reported:

- objects: whole recordings, fetched ahead as a unit of a run fetches them, by one worker process.
- ranges: batches of 64 ranges, as the training reader requests the crops of a batch.

Of each: requests a second, and CPU milliseconds of the client per request. The load of the machine
changes requests a second more than their ratio.
"""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from common import RESULTS, median, write_result

CLIENTS = {"obstore": "1", "s3fs": "0"}
LOAD_THREADS = 4
BATCH = 64
CROP_BYTES = 20_000
HEADERS = 'ETag: "1"\r\nLast-Modified: Wed, 01 Jan 2020 00:00:00 GMT\r\nContent-Length: {}\r\n\r\n'


def serve(size: int, latency: float, pipe: Connection) -> None:
    """Run a server that knows ranged GET requests only."""
    data = os.urandom(size)

    class Session(asyncio.Protocol):
        def connection_made(self, transport: Any) -> None:
            self.transport, self.received = transport, b""

        def data_received(self, received: bytes) -> None:
            *heads, self.received = (self.received + received).split(b"\r\n\r\n")
            for head in heads:
                asyncio.get_running_loop().call_later(latency, self.answer, head)

        def answer(self, head: bytes) -> None:
            bounds = head.lower().partition(b"range: bytes=")[2].partition(b"\r\n")[0].decode()
            first, last = (int(bound) for bound in bounds.split("-"))
            body = data[first : last + 1]
            lines = "HTTP/1.1 206 Partial Content\r\nContent-Range: bytes "
            lines += f"{first}-{first + len(body) - 1}/{size}\r\n{HEADERS.format(len(body))}"
            self.transport.write(lines.encode() + body)

    async def run() -> None:
        loop = asyncio.get_running_loop()
        server = await loop.create_server(Session, "127.0.0.1", 0, backlog=1024)
        pipe.send(server.sockets[0].getsockname()[1])
        await server.serve_forever()

    asyncio.run(run())


def read_objects(count: int, size: int) -> int:
    """Open and close the recordings of a unit; returns the number of requests."""
    from latentmill.sources.base import Item
    from latentmill.sources.reading import UnitReader

    items = [Item(f"{number}", f"s3://bucket/{number}.wav", size, "") for number in range(count)]

    def load(item: Item) -> None:
        with reader.open(item) as media:
            assert media.size == size

    with UnitReader(items) as reader, ThreadPoolExecutor(LOAD_THREADS) as pool:
        list(pool.map(load, items))
    return count


def read_ranges(count: int, size: int) -> int:
    """Read batches of ranges; returns the number of requests."""
    from latentmill.storage.storage import Storage

    storage, length = Storage("s3://bucket/store"), min(CROP_BYTES, size // 2)
    for batch in range(-(-count // BATCH)):
        starts = [(batch + number) * 997 % (size - length) for number in range(BATCH)]
        found = storage.read_ranges([("shards/000000.parquet", start, length) for start in starts])
        assert all(len(data) == length for data in found)
    return -(-count // BATCH) * BATCH


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--objects", type=int, default=1000)
    parser.add_argument("--bytes", type=int, default=200_000, help="size of an object")
    parser.add_argument("--latency", type=float, default=0.03, help="seconds before an answer")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    arguments = (options.bytes, options.latency, there)
    server = context.Process(target=serve, args=arguments, daemon=True)
    server.start()
    os.environ |= {
        "AWS_ACCESS_KEY_ID": "x",
        "AWS_SECRET_ACCESS_KEY": "x",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{here.recv()}",
    }
    ways: dict[str, Callable[[int, int], int]] = {"objects": read_objects, "ranges": read_ranges}
    runs: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for number in range(options.rounds + 1):
        for way, read in ways.items():
            for client, switch in CLIENTS.items():
                os.environ["LATENTMILL_OBSTORE"] = switch
                count = options.objects if number else BATCH  # the first round opens connections
                began, used = time.perf_counter(), time.process_time()
                requests = read(count, options.bytes)
                seconds, used = time.perf_counter() - began, time.process_time() - used
                if number:
                    one = (requests / seconds, 1000 * used / requests)
                    runs.setdefault((way, client), []).append(one)
                    print(f"{way} {client}: {one[0]:.0f} a second, {one[1]:.2f} ms", flush=True)
    server.terminate()
    found = {
        way: {
            client: {
                "requests_per_second": median([one[0] for one in runs[way, client]]),
                "cpu_ms_per_request": median([one[1] for one in runs[way, client]]),
            }
            for client in CLIENTS
        }
        | {
            "obstore_over_s3fs": median(
                [
                    ours[0] / other[0]
                    for ours, other in zip(runs[way, "obstore"], runs[way, "s3fs"], strict=True)
                ]
            )
        }
        for way in ways
    }
    settings = {name: getattr(options, name) for name in ("objects", "bytes", "latency", "rounds")}
    load = [round(one, 1) for one in os.getloadavg()]
    write_result("objects", {**settings, "load": load, "ways": found}, options.results)


if __name__ == "__main__":
    main()
