"""Measures reading many small objects at a latency, with obstore and with fsspec's client.

    python benchmarks/objects.py
    python benchmarks/objects.py --storage gs
    python benchmarks/objects.py --objects 2000 --bytes 200000 --latency 0.03 --rounds 5

The server answers any name with the same bytes after the latency, from a process of its own. Ways
alternate, and medians of the rounds are reported:

- objects: whole recordings, fetched ahead as a unit of a run fetches them, by one worker process.
- ranges: batches of 64 ranges, as the training reader requests the crops of a batch.
- headers: both ends of long recordings, as `plan --probe` reads their lengths.
- listing: the objects of a folder, 1,000 a request. Google's are listed with gcsfs either way.

Of each: requests a second, and CPU milliseconds of the client per request. The load of the machine
changes requests a second more than their ratio.
"""

from __future__ import annotations

import argparse
import asyncio
import io
import json
import multiprocessing
import os
import re
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from common import RESULTS, median, write_result

CLIENTS = {"s3": "s3fs", "gs": "gcsfs", "az": "adlfs"}  # of fsspec
LOAD_THREADS = 4
BATCH = 64
CROP_BYTES = 20_000
LONG_SECONDS = 10.0  # of a recording of which only the ends are read
LONG_BYTES = 44 + int(LONG_SECONDS * 44100) * 2
PAGES = 20  # of the listed folder
HEADERS = 'ETag: "1"\r\nLast-Modified: Wed, 01 Jan 2020 00:00:00 GMT\r\nContent-Length: {}\r\n\r\n'


def serve(storage: str, size: int, latency: float, pipe: Connection) -> None:
    """Run a server that knows ranged GET requests, and listings of one folder."""
    data, recording = os.urandom(size), long_recording()
    pages = [LISTINGS[storage](page).encode() for page in range(PAGES)]

    class Session(asyncio.Protocol):
        def connection_made(self, transport: Any) -> None:
            self.transport, self.received = transport, b""

        def data_received(self, received: bytes) -> None:
            *heads, self.received = (self.received + received).split(b"\r\n\r\n")
            for head in heads:
                asyncio.get_running_loop().call_later(latency, self.answer, head)

        def answer(self, head: bytes) -> None:
            whole = recording if b"/long" in head else data
            total = len(whole)
            if head.startswith(b"HEAD"):
                self.transport.write(f"HTTP/1.1 200 OK\r\n{HEADERS.format(total)}".encode())
                return
            if re.match(rb"GET \S+(list-type=2|comp=list|/o\?)", head):
                after = re.search(rb"(?:oken=|marker=|start-after=music%2F)(\d+)", head)
                body = pages[int(after[1]) if after else 0]
                lines = "HTTP/1.1 200 OK\r\nContent-Type: application/xml\r\n"
                self.transport.write((lines + HEADERS.format(len(body))).encode() + body)
                return
            bounds = head.lower().partition(b"range: bytes=")[2].partition(b"\r\n")[0].decode()
            first, last = (int(bound) for bound in bounds.split("-"))
            body = whole[first : last + 1]
            lines = "HTTP/1.1 206 Partial Content\r\nContent-Range: bytes "
            lines += f"{first}-{first + len(body) - 1}/{total}\r\n{HEADERS.format(len(body))}"
            self.transport.write(lines.encode() + body)

    async def run() -> None:
        loop = asyncio.get_running_loop()
        server = await loop.create_server(Session, "127.0.0.1", 0, backlog=1024)
        pipe.send(server.sockets[0].getsockname()[1])
        await server.serve_forever()

    asyncio.run(run())


def long_recording() -> bytes:
    import soundfile

    file, samples = io.BytesIO(), np.zeros(int(LONG_SECONDS * 44100))
    soundfile.write(file, samples, 44100, format="WAV", subtype="PCM_16")
    assert len(file.getvalue()) == LONG_BYTES
    return file.getvalue()


def s3_listing(page: int) -> str:
    """A page of a listing, as S3 returns it."""
    objects = "".join(
        f"<Contents><Key>music/{page}/{number:04}.wav</Key><Size>1</Size>"
        "<LastModified>2020-01-01T00:00:00.000Z</LastModified>"
        f"<ETag>&quot;{page}{number:031}&quot;</ETag></Contents>"
        for number in range(1000)
    )
    more = page + 1 < PAGES
    token = f"<NextContinuationToken>{page + 1}</NextContinuationToken>" if more else ""
    return (
        '<?xml version="1.0"?><ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/">'
        f"<Name>bucket</Name><Prefix>music/</Prefix><IsTruncated>{str(more).lower()}</IsTruncated>"
        f"{token}{objects}</ListBucketResult>"
    )


def google_listing(page: int) -> str:
    """A page of a listing, as Google returns the fields that were asked for."""
    found: dict[str, Any] = {
        "items": [
            {"name": f"music/{page}/{number:04}.wav", "size": "1", "etag": f"{page}{number:011}"}
            for number in range(1000)
        ]
    }
    if page + 1 < PAGES:
        found["nextPageToken"] = str(page + 1)
    return json.dumps(found)


def azure_listing(page: int) -> str:
    """A page of a listing, as Azure returns it."""
    blobs = "".join(
        f"<Blob><Name>music/{page}/{number:04}.wav</Name><Properties>"
        "<Creation-Time>Wed, 01 Jan 2020 00:00:00 GMT</Creation-Time>"
        "<Last-Modified>Wed, 01 Jan 2020 00:00:00 GMT</Last-Modified>"
        f"<Etag>0x{page}{number:012}</Etag><Content-Length>1</Content-Length>"
        "<Content-Type>audio/wav</Content-Type><BlobType>BlockBlob</BlobType>"
        "<AccessTier>Hot</AccessTier><LeaseStatus>unlocked</LeaseStatus>"
        "<LeaseState>available</LeaseState></Properties></Blob>"
        for number in range(1000)
    )
    marker = page + 1 if page + 1 < PAGES else ""
    return (
        '<?xml version="1.0"?><EnumerationResults ContainerName="bucket">'
        f"<Blobs>{blobs}</Blobs><NextMarker>{marker}</NextMarker></EnumerationResults>"
    )


LISTINGS = {"s3": s3_listing, "gs": google_listing, "az": azure_listing}


def connect(storage: str, port: int) -> None:
    """Set the environment variables with which the clients find the server."""
    url = f"http://127.0.0.1:{port}"
    account = f"AccountName=a;AccountKey=eA==;BlobEndpoint={url}/a;"
    os.environ |= {
        "s3": {
            "AWS_ACCESS_KEY_ID": "x",
            "AWS_SECRET_ACCESS_KEY": "x",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_ENDPOINT_URL": url,
        },
        "gs": {
            "FSSPEC_GS_TOKEN": "anon",
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
            "STORAGE_EMULATOR_HOST": url,
        },
        "az": {"AZURE_STORAGE_CONNECTION_STRING": account},
    }[storage]


def list_objects(bucket: str, count: int, size: int) -> int:
    """List a folder; returns the number of requests."""
    from latentmill.sources.files import Place
    from latentmill.sources.listing import folders

    found = sum(map(len, folders(Place(f"{bucket}/music"), Counter())))
    assert found == PAGES * 1000
    return PAGES


def read_headers(bucket: str, count: int, size: int) -> int:
    """Read the ends of long recordings; returns the number of requests."""
    from latentmill.plan.probe import probed
    from latentmill.sources.base import Item

    number = count // 2
    items = [Item(f"{n}", f"{bucket}/long-{n}.wav", LONG_BYTES, "") for n in range(number)]
    assert all(item.seconds == LONG_SECONDS for item in probed(items))
    return 2 * number


def read_objects(bucket: str, count: int, size: int) -> int:
    """Open and close the recordings of a unit; returns the number of requests."""
    from latentmill.sources.base import Item
    from latentmill.sources.reading import UnitReader

    items = [Item(f"{number}", f"{bucket}/{number}.wav", size, "") for number in range(count)]

    def load(item: Item) -> None:
        with reader.open(item) as media:
            assert media.size == size

    with UnitReader(items) as reader, ThreadPoolExecutor(LOAD_THREADS) as pool:
        list(pool.map(load, items))
    return count


def read_ranges(bucket: str, count: int, size: int) -> int:
    """Read batches of ranges; returns the number of requests."""
    from latentmill.storage.storage import Storage

    storage, length = Storage(f"{bucket}/store"), min(CROP_BYTES, size // 2)
    for batch in range(-(-count // BATCH)):
        starts = [(batch + number) * 997 % (size - length) for number in range(BATCH)]
        found = storage.read_ranges([("shards/000000.parquet", start, length) for start in starts])
        assert all(len(data) == length for data in found)
    return -(-count // BATCH) * BATCH


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--storage", choices=CLIENTS, default="s3")
    parser.add_argument("--objects", type=int, default=1000)
    parser.add_argument("--bytes", type=int, default=200_000, help="size of an object")
    parser.add_argument("--latency", type=float, default=0.03, help="seconds before an answer")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    storage, other = options.storage, CLIENTS[options.storage]
    arguments = (storage, options.bytes, options.latency, there)
    server = context.Process(target=serve, args=arguments, daemon=True)
    server.start()
    connect(storage, here.recv())
    clients = {"obstore": "1", other: "0"}
    ways: dict[str, Callable[[str, int, int], int]] = {
        "objects": read_objects,
        "ranges": read_ranges,
        "headers": read_headers,
        "listing": list_objects,
    }
    runs: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for number in range(options.rounds + 1):
        for way, read in ways.items():
            for client, switch in clients.items():
                os.environ["LATENTMILL_OBSTORE"] = switch
                count = options.objects if number else BATCH  # the first round opens connections
                began, used = time.perf_counter(), time.process_time()
                requests = read(f"{storage}://bucket", count, options.bytes)
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
            for client in clients
        }
        | {
            f"obstore_over_{other}": median(
                [
                    ours[0] / theirs[0]
                    for ours, theirs in zip(runs[way, "obstore"], runs[way, other], strict=True)
                ]
            )
        }
        for way in ways
    }
    settings = {name: getattr(options, name) for name in ("objects", "bytes", "latency", "rounds")}
    name = "objects" if storage == "s3" else f"objects_{storage}"
    load = [round(one, 1) for one in os.getloadavg()]
    write_result(name, {**settings, "load": load, "ways": found}, options.results)


if __name__ == "__main__":
    main()
