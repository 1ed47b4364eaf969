"""Names that a store gives never lead out of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import xxhash

import latentmill as lm
from latentmill.decoding.files import file_name
from latentmill.errors import StorageError, StoreError
from latentmill.export.export import LAYOUTS, Target, export_store
from latentmill.storage.storage import Storage, file_in_store
from latentmill.store.index import Index
from latentmill.store.verify import verify

OUTSIDE = [
    "../outside",
    "shards/../../outside",
    "/etc/passwd",
    "//etc/passwd",
    "~/x",
    "..\\outside",
    "C:\\x",
    "shards\\a.parquet",
    "file:///etc/passwd",
    "http://host/x",
    "memory://x",
    "shards/a\0.parquet",
    "shards/\x1b[31m",
    "shards/a\n",
    "shards//a",
    "./shards/a",
    "",
]


@pytest.mark.parametrize("name", OUTSIDE)
def test_only_plain_names_are_files_of_a_store(name: str) -> None:
    with pytest.raises(ValueError, match="not the name of a file"):
        file_in_store(name)


@pytest.mark.parametrize("name", ["shards/000000.parquet", "shards/000001.2.tar", "index.arrow"])
def test_its_own_names_are(name: str) -> None:
    assert file_in_store(name) == name


def in_a_commit(store: Path, name: str) -> None:
    (store / "dataset.json").unlink()
    for path in (store / "commits").iterdir():
        path.write_text(json.dumps(json.loads(path.read_text()) | {"shard": name}))


def in_the_dataset(store: Path, name: str) -> None:
    document = json.loads((store / "dataset.json").read_text())
    for shard in document["shards"]:
        shard["path"] = name
    (store / "dataset.json").write_text(json.dumps(document))


def as_the_origin(store: Path, name: str) -> None:
    document = json.loads((store / "dataset.json").read_text())
    (store / "dataset.json").write_text(json.dumps(document | {"origin": name}))


def in_the_index(store: Path, name: str) -> None:
    (index,) = store.glob("index.*")
    table = pa.ipc.open_file(index).read_all()
    names = pa.array([name] * len(table)).dictionary_encode()
    position = table.schema.get_field_index("shard")
    changed = table.set_column(position, table.schema.field("shard"), names)
    index.write_bytes(Index(changed).to_bytes())
    document = json.loads((store / "dataset.json").read_text())  # its hash is right, too
    document["index_hash"] = xxhash.xxh3_128_hexdigest(index.read_bytes())
    (store / "dataset.json").write_text(json.dumps(document))


READS: dict[str, Callable[[lm.LatentStore], object]] = {
    "record": lambda store: store["drums"],
    "crop": lambda store: store.crop("drums", 0, 2),
    "dataset": lambda store: lm.LatentDataset(store, crop=2)[0],
    "verify": lambda store: verify(store).faults,
    "export": lambda store: export_store(store, f"{store.url}-out", Target.STABLE_AUDIO_TOOLS),
}


@pytest.mark.parametrize("read", READS)
@pytest.mark.parametrize("where", [in_a_commit, in_the_dataset, as_the_origin, in_the_index])
@pytest.mark.parametrize("name", ["../outside", "/OUTSIDE", "memory://outside"])
def test_a_name_that_leads_out_is_refused(
    name: str, where: Callable[[Path, str], None], read: str, spoilable: Path
) -> None:
    outside = spoilable.parent / "outside"
    outside.write_bytes(b"secret" * 100_000)
    name = name.replace("/OUTSIDE", str(outside))
    where(spoilable, name)
    try:
        found = READS[read](lm.open(str(spoilable), device="cpu"))
    except StoreError as error:
        assert "outside of the store" in str(error) or "is not complete" in str(error)
        assert "secret" not in str(error)
    else:  # `verify` lists what it finds
        assert read == "verify"
        assert "outside of the store" in str(found)


@pytest.mark.parametrize("number", ["/../../outside", "1", 1.5, -1, None, True])
@pytest.mark.parametrize("field", ["number", "revision"])
def test_the_plan_names_its_files_by_numbers(field: str, number: object, spoilable: Path) -> None:
    path = spoilable / "plan/plan.json"
    plan = json.loads(path.read_text())
    plan["parts"][0][field] = number
    path.write_text(json.dumps(plan))
    with pytest.raises(StoreError, match=r"plan\.json is damaged"):
        _ = lm.open(str(spoilable)).plan


def test_units_are_named_by_numbers(spoilable: Path) -> None:
    path, document = spoilable / "plan/units.parquet", spoilable / "plan/plan.json"
    table = pq.read_table(path)
    names = pa.array(["../../outside"] * len(table))
    pq.write_table(table.set_column(0, "number", names), path)
    plan = json.loads(document.read_text())
    plan["parts"][0]["units_hash"] = f"xxh3:{xxhash.xxh3_128_hexdigest(path.read_bytes())}"
    document.write_text(json.dumps(plan))
    with pytest.raises(StoreError, match="does not belong to"):
        _ = lm.open(str(spoilable)).plan


@pytest.mark.parametrize("path", ["../x", "a/../../x", ".."])
def test_no_path_of_a_storage_leads_out(path: str, tmp_path: Path) -> None:
    storage = Storage(str(tmp_path / "store"))
    (tmp_path / "x").write_bytes(b"secret")
    with pytest.raises(StorageError, match="leads out of"):
        storage.read(path)
    with pytest.raises(StorageError, match="leads out of"):
        storage.write(path, b"")
    assert (tmp_path / "x").read_bytes() == b"secret"


@pytest.mark.parametrize("key", ["../x", "/etc/x", "a/../../x", "..", "a\0b", "a\\..\\b", "~/x"])
def test_keys_are_written_inside_the_folder(key: str, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    exported = [layout.name(key) for layout in LAYOUTS.values()]
    for name in (*exported, file_name(key, ".wav")):
        path = Path(f"{folder}/{name}")
        assert path.resolve().is_relative_to(folder)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
