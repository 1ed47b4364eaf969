"""Measures `latentmill view` for a large store, and sealing with the metadata file.

    python benchmarks/view.py [--records 1000000] [--sealed 20000]

Two stores of synthetic records with metadata of their own are made. The first, of `--sealed`
records, is written with the library's own writers; sealing it (index and metadata file) is measured
in a process of its own. The second has an index and a metadata file of `--records` records, written
at once, and no shards, which search does not read. The server runs in a process of its own, and its
peak memory is that of the whole process, with Python and Arrow. Searches are requests over HTTP:
each is asked once, so nothing is in the server's cache of results.
"""

from __future__ import annotations

import argparse
import json
import re
import resource
import subprocess
import sys
import tempfile
import time
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

import synthetic
from common import RESULTS, write_result
from latentmill.plan import load
from latentmill.record import Record
from latentmill.sources.base import Item
from latentmill.storage.storage import Storage
from latentmill.store.index import INDEX_SCHEMA, Index
from latentmill.store.metadata import ROW_GROUP
from latentmill.store.seal import seal
from synthetic import HOP, RATE, model_document, record

CHANNELS, FRAMES, PER_UNIT = 4, 4, 4000
GENRES = ("jazz", "rock", "techno", "folk", "ambient", "classical", "hip hop", "metal")
SEARCHES: dict[str, dict[str, Any]] = {
    "first page": {},
    "last page": {"offset": -50},
    "part of a key": {"key": "0123456"},
    "pattern": {"key": "0*/*77"},
    "text": {"where": [{"field": "metadata_genre", "op": "is", "value": "jazz"}]},
    "range": {"where": [{"field": "metadata_bpm", "op": "min", "value": 175}]},
    "three conditions": {
        "key": "7",
        "where": [
            {"field": "metadata_genre", "op": "contains", "value": "o"},
            {"field": "loudness", "op": "max", "value": -20},
        ],
    },
    "sorted": {"sort": "metadata_bpm", "descending": 1},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--records", type=int, default=1_000_000)
    parser.add_argument("--sealed", type=int, default=20_000)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--seal", metavar="STORE", help="only measure sealing a store")
    arguments = parser.parse_args()
    if arguments.seal:
        print(json.dumps(sealing(arguments.seal)))
        return
    with tempfile.TemporaryDirectory() as folder:
        store = f"{folder}/store"
        write_store(store, arguments.sealed)
        command = [sys.executable, __file__, "--seal", store]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        result: dict[str, Any] = {"sealed": arguments.sealed, **json.loads(done.stdout)}
        enlarge(Path(store), arguments.records)
        (file,) = Path(store).glob("metadata.*")
        result |= {"metadata_mib": round(file.stat().st_size / 2**20, 1)}
        result |= viewing(store)
    write_result("view", {"records": arguments.records, **result}, arguments.results)


def sealing(url: str) -> dict[str, Any]:
    storage = Storage(url)
    plan = load(storage)
    assert plan is not None
    start, cpu = time.perf_counter(), time.process_time()
    seal(storage, plan)
    return {
        "seal_seconds": round(time.perf_counter() - start, 1),
        "seal_cpu_seconds": round(time.process_time() - cpu, 1),
        "seal_peak_rss_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
    }


def viewing(store: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "latentmill", "view", store, "--no-browser", "--json"]
    start = time.perf_counter()
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        url = json.loads(server.stdout.readline())["url"]
        facts = get(f"{url}api/store")
        result: dict[str, Any] = {"ready_seconds": round(time.perf_counter() - start, 2)}
        status = Path(f"/proc/{server.pid}/status")
        result["rss_at_start_mib"] = peak_mib(status)
        result["searches"] = {
            name: search(url, facts["records"], values) for name, values in SEARCHES.items()
        }
        result["peak_rss_mib"] = peak_mib(status)
    finally:
        server.terminate()
        server.wait()
    return result


def search(url: str, records: int, values: dict[str, Any]) -> dict[str, Any]:
    values = dict(values)
    if values.get("offset", 0) < 0:
        values["offset"] += records
    texts = {name: v if isinstance(v, str) else json.dumps(v) for name, v in values.items()}
    start = time.perf_counter()
    found = get(f"{url}api/search?{urllib.parse.urlencode(texts)}")
    return {"seconds": round(time.perf_counter() - start, 3), "found": found["total"]}


def get(url: str) -> Any:
    with urllib.request.urlopen(url, timeout=600) as answer:
        return json.loads(answer.read())


def peak_mib(status: Path) -> int | None:
    if not status.exists():  # not Linux
        return None
    found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text())
    return None if found is None else int(found[1]) // 1024


def enlarge(store: Path, records: int) -> None:
    """Replace index and metadata file by those of many records, block by block."""
    path = store / "dataset.json"
    document = json.loads(path.read_text())
    for old in (*store.glob("metadata.*"), *store.glob("index.*")):
        schema = pq.read_schema(old) if old.suffix == ".parquet" else None
        old.unlink()
        if schema is not None:
            own = schema
    with pq.ParquetWriter(store / "metadata", own, compression="zstd") as file:
        for start in range(0, records, ROW_GROUP):
            numbers = np.arange(start, min(start + ROW_GROUP, records))
            file.write_table(pa.table(fields(numbers), own))
    numbers = np.arange(records)
    index = {"key": keys(numbers), "shard": pa.array(["shards/000000.parquet"] * records)}
    rows = {name: np.zeros(records, np.int64) for name in INDEX_SCHEMA.names if name not in index}
    rows |= {"row": numbers, "length": numbers * 0 + 2 * CHANNELS * FRAMES}
    rows |= {"channels": numbers * 0 + CHANNELS, "frames": numbers * 0 + FRAMES}
    columns = {name: {**index, **rows}[name] for name in INDEX_SCHEMA.names}
    columns["shard"] = columns["shard"].dictionary_encode()
    table = pa.table(
        [pa.array(c).cast(INDEX_SCHEMA.field(n).type) for n, c in columns.items()], INDEX_SCHEMA
    )
    data = Index(table).to_bytes()
    document |= {"encoded": records, "items": records}
    for kind, content in (("index", data), ("metadata", (store / "metadata").read_bytes())):
        digest = xxhash.xxh3_128_hexdigest(content)
        name = f"{kind}.{digest[:16]}.{'arrow' if kind == 'index' else 'parquet'}"
        (store / name).write_bytes(content)
        document |= {kind: name, f"{kind}_hash": digest}
    (store / "metadata").unlink()
    path.write_text(json.dumps(document))


def keys(numbers: np.ndarray) -> pa.Array:
    return pa.array([f"{n // 1000:04d}/{n:08d}" for n in numbers.tolist()])


def own_metadata(number: int) -> dict[str, Any]:
    return {
        "title": f"Song number {number} of {GENRES[number % 8]}",
        "genre": GENRES[number % 8],
        "bpm": 60 + number % 120 + 0.5,
        "year": 1950 + number % 75,
    }


def fields(numbers: np.ndarray) -> dict[str, Any]:
    """The columns of the metadata file."""
    own = [own_metadata(n) for n in numbers.tolist()]
    count, rms = len(numbers), 0.01 + numbers % 977 * 4e-4
    constants = {"dtype": "float16", "frames": FRAMES, "channels": CHANNELS, "role": None}
    constants |= {"num_samples": FRAMES * HOP, "sample_rate": RATE, "source_sample_rate": RATE}
    constants |= {"source_channels": 2, "duration": FRAMES * HOP / RATE, "peak": 0.5}
    constants |= {"group": None, "silence": 0.0, "shape": [CHANNELS, FRAMES]}
    return {
        **{name: [value] * count for name, value in constants.items()},
        "key": keys(numbers),
        "source_uri": [f"/music/{n:08d}.wav" for n in numbers.tolist()],
        "content_hash": [f"xxh3:{n * 2654435761 % 2**64:032x}" for n in numbers.tolist()],
        "rms": rms,
        "loudness": 20 * np.log10(rms),
        "metadata": [json.dumps(one) for one in own],
        **{f"metadata_{name}": [one[name] for one in own] for name in own[0]},
    }


def write_store(url: str, records: int) -> None:
    """A store without its seal."""
    latent = np.ones((CHANNELS, FRAMES), np.float16)

    def made(item: Item) -> Record:
        number = int(item.key[-8:])
        return record(item, number, latent, samples=FRAMES * HOP, own=own_metadata(number))

    names = (f"{n // 1000:04d}/{n:08d}" for n in range(records))
    document = model_document(CHANNELS)
    synthetic.write_store(url, names, made, document, per_unit=PER_UNIT, sealed=False)


if __name__ == "__main__":
    main()
