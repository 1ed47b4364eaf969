"""Stored fields and filters: right, in the order of the keys, and without reading a latent."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from latentmill.errors import ConfigError, StorageError, StoreError
from latentmill.reader import fields as fields_module
from latentmill.reader.batches import BatchSampler
from latentmill.reader.dataset import LatentDataset
from latentmill.reader.fields import FIELDS, FieldReader, select
from latentmill.reader.shards import ShardReader
from latentmill.reader.stem_dataset import StemDataset
from latentmill.reader.stems import AllStems
from latentmill.reader.stream import LatentStream
from latentmill.storage.storage import Storage
from latentmill.store.formats import SHARD_FORMATS
from latentmill.store.store import LatentStore
from support.latent_store import write_latents


def test_gathered_fields_are_those_of_the_records(made: LatentStore) -> None:
    table = FieldReader(made).gather()
    assert table.column_names == list(FIELDS)
    assert table["key"].to_pylist() == list(made.keys())
    for row in table.to_pylist():
        record = made[row["key"]]
        assert row["frames"] == record.frames
        assert row["role"] == record.role
        assert row["duration"] == record.duration


def test_rows_come_as_asked_and_few_stay(
    made: LatentStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fields_module, "KEPT_BYTES", 1)
    reader = FieldReader(made, ["key", "role"])
    rows = np.array([39, 0, 17, 0])
    keys = list(made.keys())
    assert [row["key"] for row in reader.read(rows)] == [keys[row] for row in rows]
    reader.read(np.array([1]))
    assert len(reader._kept) <= 1
    assert pickle.loads(pickle.dumps(reader)).read(rows) == reader.read(rows)


CONDITIONS = {
    "function": lambda fields: fields["role"] == "drums" and fields["frames"] > 100,
    "expression": (pc.field("role") == "drums") & (pc.field("frames") > 100),
    "condition": "role == 'drums' and frames > 100 and number >= 0",
}


def without_metadata(store: LatentStore) -> LatentStore:
    """The same store as an earlier version sealed it."""
    copy = LatentStore(store.url, device="cpu")
    copy._info = copy.info.model_copy(update={"metadata": None, "metadata_hash": None})
    return copy


def test_the_metadata_file_has_what_the_shards_have(
    made: LatentStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = without_metadata(made)
    expected = FieldReader(old).gather()
    chosen = [select([old], where)[0] for where in CONDITIONS.values()]
    assert len({tuple(rows.tolist()) for rows in chosen}) == 1
    monkeypatch.setattr(fields_module, "read_columns", None)  # no shard is read
    monkeypatch.setattr(FieldReader, "_members", None)
    assert FieldReader(made).gather().to_pylist() == expected.to_pylist()
    for where, rows in zip(CONDITIONS.values(), chosen, strict=True):
        assert np.array_equal(select([made], where)[0], rows)


def test_a_damaged_metadata_file_is_one_sentence(tmp_path: Path, one_sentence) -> None:
    store = write_latents(str(tmp_path), [3, 4])
    path = tmp_path / str(store.info.metadata)
    for data in (path.read_bytes()[:-1], b""):
        path.write_bytes(data)
        with pytest.raises(StoreError, match="run the same encode command") as error:
            select([store], "frames > 3")
        one_sentence(error.value)


def test_a_metadata_file_of_other_records_is_not_used(tmp_path: Path) -> None:
    store, other = (write_latents(str(tmp_path / n), [3, 4], prefix=n) for n in "ab")
    store._info = store.info.model_copy(update={"metadata": other.info.metadata})
    store._info = store.info.model_copy(update={"metadata_hash": other.info.metadata_hash})
    path = Path(other.url, str(other.info.metadata))
    (tmp_path / "a" / path.name).write_bytes(path.read_bytes())
    assert FieldReader(store).gather()["key"].to_pylist() == ["a/00000", "a/00001"]


@pytest.mark.parametrize("where", CONDITIONS.values(), ids=CONDITIONS)
def test_a_filter_chooses_without_reading_latents(
    made: LatentStore, where: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = [r.key for r in made if r.role == "drums" and r.frames > 100]
    monkeypatch.setattr(ShardReader, "fill", None)
    (rows,) = select([made], where)
    assert [made.index.key(row) for row in rows] == expected
    assert 0 < len(expected) < len(made)
    assert len(LatentDataset(made, crop=8, where=where)) == len(expected)


def test_a_filter_sees_the_items_own_metadata(made: LatentStore) -> None:
    (rows,) = select([made], lambda fields: fields["metadata"]["number"] % 10 == 3)
    assert [made.index.key(row)[-2:] for row in rows] == ["03", "13", "23", "33"]


def test_bad_filters_are_one_sentence(made: LatentStore, one_sentence) -> None:
    for where, word in [
        (lambda fields: fields["tempo"] > 3, "tempo"),
        (lambda fields: fields["role"] > 3, "TypeError"),
        (pc.field("tempo") > 3, "tempo"),
        (lambda fields: False, "No record"),
        ("tempo > 3", "no such field"),
        ("__import__('os')", "invalid where condition"),
    ]:
        with pytest.raises(ConfigError, match=word) as error:
            select([made], where)
        assert str(error.value).endswith(".")


@pytest.mark.parametrize(
    ("where", "near"),
    [
        ("nmber > 3", "number"),
        ("role == 'drums' and dration > 1", "duration"),
        ("metadata.nmber > 3", "metadata"),
        (lambda fields: fields["dration"] > 1, "duration"),
        (lambda fields: fields["metadata"]["nmber"] > 1, "number"),
        (pc.field("dration") > 1, "duration"),
    ],
)
def test_a_misspelt_field_is_no_such_field(
    made: LatentStore, where, near: str, one_sentence
) -> None:
    with pytest.raises(ConfigError, match="no such field: did you mean") as error:
        LatentDataset(made, crop=8, where=where)
    assert near in one_sentence(error.value)


def test_one_of_several_stores_may_have_no_match(tmp_path: Path) -> None:
    """A field that only some records of one store have is a field; weights go to the others."""
    jazz = [{"genre": "jazz", "tags": {"mood": "calm"}}, {}, {}]
    stores = [
        write_latents(str(tmp_path / "jazz"), [9, 9, 9], metadata=jazz, prefix="a"),
        write_latents(str(tmp_path / "rock"), [9, 9], prefix="b"),
    ]
    for where in ("genre == 'jazz'", "tags.mood == 'calm'"):
        dataset = LatentDataset(stores, crop=4, where=where)
        assert [sample.key for sample in dataset] == ["a/00000"]
        stream = LatentStream(stores, crop=4, where=where, weights=[1, 3])
        assert [sample.key for sample in stream] == ["a/00000"]
        assert len(list(BatchSampler(dataset, 2, weights=[1, 3]))) == 1
    with pytest.raises(ConfigError, match=r"No record of .*jazz or .*rock matches"):
        LatentDataset(stores, crop=4, where="genre == 'folk'")


def test_remote_fields_are_the_same(lengths: list[int]) -> None:
    for name in SHARD_FORMATS:
        store = write_latents(f"memory://fields-{name}", lengths, format_name=name)
        reader = FieldReader(store, ["key", "metadata"])
        assert [row["key"] for row in reader.read(np.arange(40))] == list(store.keys())
        assert reader.gather()["key"].to_pylist() == list(store.keys())


def test_of_a_remote_shard_only_the_fields_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    store = write_latents("memory://fields-alone", [4000] * 40, channels=16, per_unit=40)
    asked: list[int] = []
    one, several = Storage.read_range, Storage.read_ranges
    monkeypatch.setattr(
        Storage, "read_range", lambda self, *a: (asked.append(a[2]), one(self, *a))[1]
    )
    monkeypatch.setattr(
        Storage,
        "read_ranges",
        lambda self, r: (asked.extend(n for *_, n in r), several(self, r))[1],
    )
    for row in FieldReader(store, ["key", "metadata"]).read(np.arange(40)):
        assert row["metadata"] == json.dumps({"number": int(row["key"][-5:])})
    assert 0 < sum(asked) < 100_000  # of 5 MB
    asked.clear()
    assert store["item/00007"].metadata == {"number": 7}
    assert 0 < sum(asked) - store.entry("item/00007").length < 100_000


def test_a_store_of_an_earlier_version_has_no_levels(
    tmp_path: Path, lengths: list[int], one_sentence
) -> None:
    store = write_latents(str(tmp_path), lengths)
    with pytest.raises(ConfigError, match="active_db") as error:
        StemDataset(store, AllStems(("bass",)), crop=4)[0]
    one_sentence(error.value)
    for shard in (tmp_path / "shards").iterdir():
        pq.write_table(pq.read_table(shard).drop_columns(["levels"]), shard)
    reader = FieldReader(store, ["levels", "key"])
    assert reader.read(np.array([3]))[0] == {"levels": None, "key": "item/00003"}
    assert reader.gather()["levels"].null_count == len(lengths)


def test_a_damaged_shard_is_one_sentence(lengths: list[int], one_sentence) -> None:
    store = without_metadata(write_latents("memory://damaged", lengths))
    store.storage.write("shards/000002.parquet", b"PAR1 and no more")
    with pytest.raises(StorageError, match="damaged"):
        FieldReader(store).gather()
