"""Measures fields: reading them with the latents, the size of ragged tokens, opening large indexes.

    python benchmarks/fields.py
    python benchmarks/fields.py --items 200 --captions 1000 --records 100000 --rounds 3

- read: batches of 32 random crops with all fields, by `Loader` over a `LatentStream`, compared with
  what single fields predict, in two ways. `stores`: the sum of the times of reading the latents and
  each field alone, as a store. `increments`: the time of the latents, and for each field how much
  longer reading the latents with this field takes; this prediction is the faster one. The ratio is
  the share of the predicted rate. Ways alternate, and medians of the rounds are reported; CPU
  seconds are those of this process.
- size: the shards of captions' tokens, ragged and padded to the longest caption.
- opening: `LatentDataset` over a store with an index of 1,000,000 records, and with three fields of
  as many, in a process that has imported everything. The shards do not exist.
- imports: peak memory of a process that reads files of vectors as `add --from FILE.parquet` does,
  less that of a process that only imports the library. The file has another order than the store.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from common import RESULTS, ROOT, median, write_result

sys.path.insert(0, str(ROOT / "tests"))

CROP, BATCH = 256, 32
FRAMES, CHANNELS = 2000, 64
# Fields by name: kind, dimensions, frames of the field per latent frame.
FIELDS = {"codec": ("frames", 128, 1.25), "text": ("tokens", 768, 0), "clap": ("vector", 512, 0)}


def caption_lengths(count: int, seed: int = 0) -> np.ndarray:
    """Tokens of captions: median 24, most from 8 to 70, at most 128."""
    drawn = np.random.default_rng(seed).lognormal(np.log(24), 0.55, count)
    return np.clip(drawn.astype(np.int64), 2, 128)


def write_stores(folder: Path, items: int) -> str:
    """A store of noise and three fields."""
    from latentmill.plan import FieldEntry
    from support.latent_store import HOP, write_latents

    random = np.random.default_rng(0)
    lengths = random.integers(FRAMES // 2, FRAMES * 3 // 2, items).tolist()

    def write(url: str, counts: list[int], dimensions: int, **options: Any) -> None:
        made = [random.standard_normal((n, dimensions), np.float32) for n in counts]
        latents = [one.astype(np.float16).T for one in made]
        write_latents(url, counts, channels=dimensions, latents=latents, per_unit=64, **options)

    url = str(folder / "store")
    write(url, lengths, CHANNELS)
    for name, (kind, dimensions, rate) in FIELDS.items():
        counts = {
            "frames": [round(n * rate) for n in lengths],
            "tokens": caption_lengths(items).tolist(),
            "vector": [1] * items,
        }[kind]
        model = {"hop": round(HOP / rate)} if rate else {}
        entry = FieldEntry(name, kind, "audio")  # type: ignore[arg-type]
        write(f"{url}/fields/{name}", counts, dimensions, field=entry, model=model)
    return url


def measure_read(url: str, rounds: int) -> dict[str, Any]:
    """Seconds per epoch of every way, and the share of the predicted rate."""
    import latentmill as lm

    store = lm.open(url)

    def loader(place: Any, crop: int | None, **options: Any) -> lm.Loader:
        stream = lm.LatentStream(place, crop=crop, metadata=False, **options)
        return lm.Loader(stream, BATCH, workers=0)

    crops = {name: round(CROP * rate) or None for name, (_, _, rate) in FIELDS.items()}
    ways = {"latents": loader(store, CROP), "all": loader(store, CROP, fields=list(FIELDS))}
    ways |= {name: loader(store.field(name), crop) for name, crop in crops.items()}
    ways |= {f"latents + {name}": loader(store, CROP, fields=[name]) for name in FIELDS}
    wall: dict[str, list[float]] = {name: [] for name in ways}
    cpu: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + 1):
        for name, way in ways.items():
            began, used = time.perf_counter(), time.process_time()
            for _ in way:
                pass
            if number:  # the first round opens files and fills the page cache
                wall[name].append(time.perf_counter() - began)
                cpu[name].append(time.process_time() - used)
    shares: dict[str, dict[str, float]] = {}
    for clock, taken in (("wall", wall), ("cpu", cpu)):
        times = {name: np.array(values) for name, values in taken.items()}
        stores = times["latents"] + sum(times[name] for name in FIELDS)
        more = sum(times[f"latents + {name}"] - times["latents"] for name in FIELDS)
        predictions = {"stores": stores, "increments": times["latents"] + more}
        shares[clock] = {
            name: median((predicted / times["all"]).tolist())
            for name, predicted in predictions.items()
        }
    samples = len(store)
    return {
        "samples": samples,
        "samples_a_second": {name: round(samples / median(taken)) for name, taken in wall.items()},
        "share_of_predicted_rate": shares,
    }


def measure_size(folder: Path, captions: int) -> dict[str, Any]:
    """Bytes of the shards of tokens, ragged and padded."""
    from support.latent_store import write_latents

    lengths, dimensions = caption_lengths(captions), 64
    random = np.random.default_rng(0)
    tokens = [random.standard_normal((dimensions, n)).astype(np.float16) for n in lengths]
    padded = [np.pad(one, ((0, 0), (0, lengths.max() - one.shape[1]))) for one in tokens]
    sizes = {}
    for name, latents in (("ragged", tokens), ("padded", padded)):
        counts = [one.shape[1] for one in latents]
        store = write_latents(
            str(folder / name), counts, channels=dimensions, latents=latents, per_unit=1000
        )
        sizes[name] = sum(size for size, _ in store.shard_sizes().values())
        shutil.rmtree(folder / name)
    return {
        "captions": captions,
        "tokens": {"median": int(np.median(lengths)), "longest": int(lengths.max())},
        "bytes": sizes,
        "saved": round(1 - sizes["ragged"] / sizes["padded"], 3),
    }


def write_large_index(url: str, records: int, channels: int) -> None:
    """Put an index of many made-up records into a small store."""
    import xxhash

    from latentmill.store.index import INDEX_SCHEMA

    frames, shards = 1000, max(1, records // 4096)
    numbers = np.arange(records)
    of_shard = numbers * shards // records
    path = Path(url) / "dataset.json"
    info = json.loads(path.read_text())
    names = [f"shards/{n:06d}.parquet" for n in range(shards)]
    columns = {
        "key": pa.array([f"album {n // 12:06d}/track {n:07d}.flac" for n in range(records)]),
        "shard": pa.DictionaryArray.from_arrays(pa.array(of_shard, pa.int32()), pa.array(names)),
        "row": pa.array(numbers % 4096, pa.int32()),
        "offset": pa.array(numbers % 4096 * frames * channels * 2),
        "length": pa.array(np.full(records, frames * channels * 2)),
        "hash": pa.array(numbers.astype(np.uint64)),
        "chunks": pa.array(np.zeros(records, np.int32)),
        "channels": pa.array(np.full(records, channels, np.int32)),
        "frames": pa.array(np.full(records, frames, np.int32)),
        "num_samples": pa.array(np.full(records, frames * 4096)),
        "fields_offset": pa.array(np.full(records, -1)),
        "fields_length": pa.array(np.full(records, -1)),
    }
    table = pa.table(columns).cast(INDEX_SCHEMA)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, INDEX_SCHEMA) as file:
        file.write_table(table)
    data = sink.getvalue().to_pybytes()
    (path.parent / "index.00.arrow").write_bytes(data)
    shard = {"rows": 4096, "bytes": 10**12, "hash": "0"}
    info |= {
        "index": "index.00.arrow",
        "index_hash": xxhash.xxh3_128_hexdigest(data),
        "shards": [{"path": name, **shard} for name in names],
        "encoded": records,
    }
    path.write_text(json.dumps(info))


def real_time() -> str:
    """Measure in real-time scheduling, if this is root: then other processes do not delay it.

    A nice value has no such effect where the kernel divides the time among sessions first.
    """
    try:
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
    except PermissionError:
        return "other"
    return "fifo"


def measure_opening(folder: Path, records: int, rounds: int) -> dict[str, Any]:
    """Milliseconds until a dataset over a large index exists, without and with fields."""
    import latentmill as lm
    from latentmill.plan import FieldEntry
    from support.latent_store import write_latents

    url = str(folder / "large")
    places = {url: 4, **{f"{url}/fields/{name}": d for name, (_, d, _) in FIELDS.items()}}
    for place, channels in places.items():
        name = place.rpartition("/")[2]
        kind = FIELDS[name][0] if name in FIELDS else None
        entry = FieldEntry(name, kind, "audio") if kind else None  # type: ignore[arg-type]
        write_latents(place, [4], channels=channels, field=entry)
        write_large_index(place, records, channels)

    def opened(fields: list[str]) -> Callable[[], object]:
        return lambda: lm.LatentDataset(url, crop=CROP, fields=fields)

    ways = {"store": lambda: lm.open(url).index, "latents": opened([]), "fields": opened([*FIELDS])}
    wall: dict[str, list[float]] = {name: [] for name in ways}
    cpu: dict[str, list[float]] = {name: [] for name in ways}
    scheduler = real_time()
    for number in range(rounds + 1):
        for name, way in ways.items():
            began, used = time.perf_counter(), time.process_time()
            way()
            if number:
                wall[name].append(1000 * (time.perf_counter() - began))
                cpu[name].append(1000 * (time.process_time() - used))
    os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
    return {
        "records": records,
        "scheduler": scheduler,
        "ms": {name: median(values) for name, values in wall.items()},
        "cpu_ms": {name: median(values) for name, values in cpu.items()},
    }


IMPORT = """
import sys
from latentmill.fields.imported import ImportedValues
from latentmill.store.schema import Commit, ItemEntry

def peak():  # of this process alone, unlike ru_maxrss, which begins with its parent's
    lines = dict(line.split(":") for line in open("/proc/self/status"))
    return int(lines["VmHWM"].split()[0]) // 1024

before, (path, count) = peak(), (sys.argv[1], int(sys.argv[2]))
values = ImportedValues(path, "v")
for start in range(0, count, 4096):  # unit by unit
    keys = [f"track {n:07d}" for n in range(start, min(start + 4096, count))]
    entries = [ItemEntry(key=key, status="skipped", reason="made up") for key in keys]
    commit = Commit(unit="0", fingerprint="", bytes=0, rows=0, audio_seconds=0, items=entries,
                    timings={})
    for _ in values.read(commit, keys):
        pass
print(peak() - before)
"""


def measure_imports(folder: Path, counts: list[int], dimensions: int = 512) -> dict[str, Any]:
    """MiB of memory and of the file, by the number of vectors."""
    found = {}
    for count in counts:
        random, file = np.random.default_rng(0), folder / "vectors.parquet"
        order = random.permutation(count)
        schema = pa.schema([("key", pa.string()), ("v", pa.list_(pa.float32()))])
        with pq.ParquetWriter(file, schema) as writer:
            for start in range(0, count, 1 << 16):
                keys = [f"track {n:07d}" for n in order[start : start + (1 << 16)]]
                made = pa.array(random.standard_normal(len(keys) * dimensions, np.float32))
                ends = np.arange(len(keys) + 1, dtype=np.int32) * dimensions
                writer.write_table(pa.table([keys, pa.ListArray.from_arrays(ends, made)], schema))
        command = [sys.executable, "-c", IMPORT, str(file), str(count)]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        size = file.stat().st_size
        found[str(count)] = {"memory_mib": int(done.stdout), "file_mib": round(size / 2**20)}
        file.unlink()
    return {"dimensions": dimensions, "vectors": found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--items", type=int, default=1000)
    parser.add_argument("--captions", type=int, default=10_000)
    parser.add_argument("--records", type=int, default=1_000_000)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--only", nargs="*", default=["read", "size", "opening", "imports"])
    parser.add_argument("--imports", type=int, nargs="*", default=[100_000, 1_000_000])
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    before = options.results / "fields.json"
    result = json.loads(before.read_text()) if before.exists() else {}
    result.pop("machine", None)
    with tempfile.TemporaryDirectory() as made:
        folder, rounds = Path(made), options.rounds
        if "read" in options.only:
            result["read"] = measure_read(write_stores(folder, options.items), rounds)
        if "size" in options.only:
            result["size"] = measure_size(folder, options.captions)
        if "opening" in options.only:
            result["opening"] = measure_opening(folder, options.records, rounds)
        if "imports" in options.only:
            result["imports"] = measure_imports(folder, options.imports)
    write_result("fields", result, options.results)


if __name__ == "__main__":
    main()
