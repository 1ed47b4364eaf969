"""metadata.parquet: the records' fields in the order of the index, for search and other tools."""

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import store_files
import xxhash

from latentmill.errors import StorageError, StoreError
from latentmill.storage.guard import GuardedStorage
from latentmill.storage.storage import Storage
from latentmill.store.metadata import PREFIX, publish_metadata, write_metadata
from latentmill.store.schema import DATASET_PATH
from latentmill.store.seal import current_seal, seal
from latentmill.store.store import LatentStore
from latentmill.store.verify import verify
from support.latent_store import write_again, write_latents


def table_of(store: LatentStore) -> list[dict[str, Any]]:
    """The rows of a store's metadata file."""
    assert store.info.metadata is not None
    return pq.read_table(Path(store.url, store.info.metadata)).to_pylist()


def silence_of(store: LatentStore, key: str) -> float | None:
    """The share of bytes that stand for less than -60 dB, from the definition in docs/design.md."""
    levels = store.levels(key)
    return None if levels is None else sum((v - 255) / 2 < -60 for v in levels) / len(levels)


@pytest.mark.parametrize("stitch", ["trim", "none"])
def test_every_row_is_its_record(corpus: Path, tmp_path: Path, stitch: str) -> None:
    for format_name in store_files.FORMATS:
        url = str(tmp_path / format_name)
        store = store_files.write_store(url, corpus, format=format_name, stitch=stitch)
        rows = table_of(store)
        assert [row["key"] for row in rows] == list(store.keys()) == store_files.KEYS
        for row, record in zip(rows, store, strict=True):
            for name in ("duration", "frames", "group", "role", "source_uri", "rms", "peak"):
                assert row[name] == getattr(record, name), name
            assert json.loads(row["metadata"]) == record.metadata
            assert row["loudness"] == pytest.approx(max(-127.5, 20 * math.log10(record.rms)))
            assert row["silence"] == silence_of(store, record.key)
            assert row["shape"] == list(record.latent.shape)
        (song,) = (row for row in rows if row["key"] == "album one/été")
        assert (song["metadata_title"], song["metadata_bpm"]) == ("Été à 東京 🎵", 127.5)
        assert song["metadata_text"] == "a caption — with a dash"
        assert "metadata_tags" not in song  # a list is no scalar
        assert verify(store).faults == []


MIXED = [
    {"i": 1, "f": 1, "b": True, "s": "x", "mixed": 1, "big": 2**62, "n": None, "l": [1], "a.b": 1},
    {"i": None, "f": 0.5, "b": False, "s": "", "mixed": "1", "big": 1, "n": None, "l": 1},
    {"i": -(2**63) + 1, "f": 2**60, "s": "\ud800", "huge": 10**30, "nan": math.nan, "\n": 1},
    {"f": 2**53 + 1, "Länge": 3, "long" * 20: 1, "o": {"a": 1}},
]


def test_the_types_of_columns(tmp_path: Path) -> None:
    store = write_latents(str(tmp_path / "s"), [3, 3, 3, 3], metadata=MIXED, per_unit=1)
    rows = table_of(store)
    own = {name.removeprefix(PREFIX) for name in rows[0] if name.startswith(PREFIX)}
    # f has a number that is not exact as float64; half a surrogate pair is not text.
    assert own == {"i", "b", "big", "nan", "Länge"}
    assert [row["metadata_i"] for row in rows] == [1, None, -(2**63) + 1, None]
    assert [row["metadata_b"] for row in rows] == [True, False, None, None]
    assert [row["metadata_big"] for row in rows] == [2**62, 1, None, None]
    assert [row["metadata_Länge"] for row in rows] == [None, None, None, 3]
    for row, own in zip(rows, MIXED, strict=True):
        assert str(json.loads(row["metadata"])) == str(own)  # NaN differs from itself


def test_integers_and_fractions_are_one_column(tmp_path: Path) -> None:
    own = [{"bpm": 120}, {"bpm": 99.5}, {"bpm": None}]
    rows = table_of(write_latents(str(tmp_path / "s"), [3, 3, 3], metadata=own))
    assert [row["metadata_bpm"] for row in rows] == [120.0, 99.5, None]
    assert isinstance(rows[0]["metadata_bpm"], float)


def test_at_most_64_columns_of_those_that_occur_most(tmp_path: Path) -> None:
    own = [{f"n{k:05d}": 1 for k in range(n * 5000)} | {"z": n} for n in (0, 1, 3)]
    rows = table_of(write_latents(str(tmp_path / "s"), [3, 3, 3], metadata=own))
    names = [name for name in rows[0] if name.startswith(PREFIX)]
    assert len(names) == 64 and "metadata_z" in names and "metadata_n00000" in names


def test_units_that_are_not_in_the_order_of_keys(tmp_path: Path) -> None:
    """Many small units, in several row groups; a group is one block of a unit."""
    count = 120
    own = [{"number": n} for n in range(count)]
    url = str(tmp_path / "s")
    store = write_latents(url, [3] * count, metadata=own, per_unit=7)
    rng = np.random.default_rng(0)
    latents = [rng.standard_normal((4, 3)).astype(np.float16) for _ in range(count)]
    store = write_again(url, [3, 11], latents, failed=[25, 80])
    rows = table_of(store)
    assert [row["key"] for row in rows] == list(store.keys())
    assert [row["key"] for row in rows] == [
        f"item/{n:05d}" for n in range(count) if n not in (25, 80)
    ]
    for row in rows:
        assert json.loads(row["metadata"]) == store[row["key"]].metadata
    names = [path.name for path in Path(url).glob("metadata.*")]
    assert names == [store.info.metadata], "the superseded file was removed"


def test_row_groups_are_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("latentmill.store.metadata.ROW_GROUP", 7)
    store = write_latents(str(tmp_path / "s"), [3] * 40, per_unit=9)
    assert store.info.metadata is not None
    path = Path(store.url, store.info.metadata)
    assert pq.read_metadata(path).num_row_groups == 6
    assert [row["key"] for row in table_of(store)] == list(store.keys())
    assert verify(store).faults == []


def test_the_same_store_has_the_same_file(stores: dict[str, Path]) -> None:
    """Its name is its hash, and the format of the shards does not matter."""
    names = {LatentStore(str(folder), device="cpu").info.metadata for folder in stores.values()}
    assert len(names) == 1
    (name,) = names
    assert re.fullmatch(r"metadata\.[0-9a-f]{16}\.parquet", str(name))


def test_duckdb_reads_it(stores: dict[str, Path]) -> None:
    pattern = stores["parquet"] / "metadata.*.parquet"
    found = duckdb.sql(f"SELECT key FROM '{pattern}' WHERE metadata_bpm > 100 ORDER BY key")
    assert found.fetchall() == [("album one/été",)]


DAMAGE = {
    "missing": lambda path: path.unlink(),
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-9]),
    "another": lambda path: path.write_bytes(b"PAR1" * 10),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_is_found_and_written_again(damage: str, spoilable: Path) -> None:
    store = LatentStore(str(spoilable), device="cpu")
    assert store.info.metadata is not None and store.info.seal is not None
    path = spoilable / store.info.metadata
    before = path.read_bytes()
    DAMAGE[damage](path)
    faults = verify(store).faults
    assert len(faults) == 1 and path.name in faults[0]
    storage = Storage(str(spoilable))
    if damage == "a folder":  # which no run removes, as for every other file
        path.rmdir()
    assert current_seal(storage, store.info.seal) is None
    seal(storage, store.plan)
    assert path.read_bytes() == before
    assert verify(LatentStore(str(spoilable), device="cpu")).faults == []


def test_a_run_that_has_lost_the_store_writes_no_file(spoilable: Path) -> None:
    store = LatentStore(str(spoilable), device="cpu")
    path = spoilable / str(store.info.metadata)
    path.unlink()

    def lost() -> None:
        raise StoreError("another run has the store")

    with pytest.raises(StoreError, match="another run"):
        publish_metadata(GuardedStorage(str(spoilable), lost), store.index)
    assert not path.exists() and not (spoilable / "tmp").exists()
    assert publish_metadata(Storage(str(spoilable)), store.index)[0] == path.name


def test_a_store_in_a_bucket(s3_bucket: str) -> None:
    store = write_latents(f"{s3_bucket}/s", [3] * 20, per_unit=7)
    name = str(store.info.metadata)
    data = store.storage.read(name)
    assert pq.read_table(pa.BufferReader(data))["key"].to_pylist() == list(store.keys())
    store.storage.write(name, data[:-1])  # damaged, under the name that it has
    assert "metadata" in verify(store).faults[0]
    seal(store.storage, store.plan)
    assert store.storage.read(name) == data


def test_rows_of_other_records_are_found(stores: dict[str, Path], tmp_path: Path) -> None:
    """A file that has the hash in dataset.json, but other values than the shards."""
    folder = Path(shutil.copytree(stores["parquet"], tmp_path / "store"))
    store = LatentStore(str(folder), device="cpu")
    table = pq.read_table(folder / str(store.info.metadata))
    rms = table["rms"].to_numpy() * 2
    forged = table.set_column(table.schema.get_field_index("rms"), table.schema.field("rms"), [rms])
    pq.write_table(forged, folder / "metadata.0123456789abcdef.parquet")
    document = json.loads((folder / DATASET_PATH).read_text())
    data = (folder / "metadata.0123456789abcdef.parquet").read_bytes()
    document["metadata"] = "metadata.0123456789abcdef.parquet"
    document["metadata_hash"] = xxhash.xxh3_128_hexdigest(data)
    (folder / DATASET_PATH).write_text(json.dumps(document))
    (fault,) = verify(LatentStore(str(folder), device="cpu")).faults
    assert "not that of the records" in fault


def test_a_store_of_an_earlier_version(spoilable: Path) -> None:
    """It opens, is whole, and the same encode command writes the file."""
    document = json.loads((spoilable / DATASET_PATH).read_text())
    (spoilable / document.pop("metadata")).unlink()
    del document["metadata_hash"]
    (spoilable / DATASET_PATH).write_text(json.dumps(document))
    store = LatentStore(str(spoilable), device="cpu")
    assert store.complete and store.info.metadata is None and verify(store).faults == []
    assert [record.key for record in store] == store_files.KEYS
    assert current_seal(Storage(str(spoilable)), document["seal"]) is None
    assert seal(Storage(str(spoilable)), store.plan).metadata is not None


def test_a_shard_with_damaged_fields(spoilable: Path, tmp_path: Path) -> None:
    store = LatentStore(str(spoilable), device="cpu")
    index = store.index
    path = min((spoilable / "shards").iterdir())
    data = bytearray(path.read_bytes())
    if path.suffix == ".parquet":
        group = pq.read_metadata(path).row_group(0)
        column = next(c for n in range(99) if (c := group.column(n)).path_in_schema == "metadata")
        place = column.dictionary_page_offset + 20
    else:
        place = data.index(b'"metadata"')
    data[place : place + 10] = b"\0" * 10
    path.write_bytes(data)
    with pytest.raises(StorageError, match="damaged"):
        write_metadata(Storage(str(spoilable)), index, tmp_path / "file", tmp_path / "rows")
