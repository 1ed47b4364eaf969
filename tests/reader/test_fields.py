"""Stored fields and filters: right, in the order of the keys, and without reading a latent."""

from __future__ import annotations

import pickle

import numpy as np
import pyarrow.compute as pc
import pytest

from latentmill.errors import ConfigError, StorageError
from latentmill.reader import fields as fields_module
from latentmill.reader.dataset import LatentDataset
from latentmill.reader.fields import FIELDS, FieldReader, select
from latentmill.reader.shards import ShardReader
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


@pytest.mark.parametrize(
    "where",
    [
        lambda fields: fields["role"] == "drums" and fields["frames"] > 100,
        (pc.field("role") == "drums") & (pc.field("frames") > 100),
        "role == 'drums' and frames > 100 and number >= 0",
    ],
    ids=["function", "expression", "condition"],
)
def test_a_filter_chooses_without_reading_latents(
    made: LatentStore, where: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = [r.key for r in made if r.role == "drums" and r.frames > 100]
    monkeypatch.setattr(ShardReader, "fill", None)
    rows = select(made, where)
    assert [made.index.key(row) for row in rows] == expected
    assert 0 < len(expected) < len(made)
    assert len(LatentDataset(made, crop=8, where=where)) == len(expected)


def test_a_filter_sees_the_items_own_metadata(made: LatentStore) -> None:
    rows = select(made, lambda fields: fields["metadata"]["number"] % 10 == 3)
    assert [made.index.key(row)[-2:] for row in rows] == ["03", "13", "23", "33"]


def test_bad_filters_are_one_sentence(made: LatentStore, one_sentence) -> None:
    for where, word in [
        (lambda fields: fields["tempo"] > 3, "tempo"),
        (lambda fields: fields["role"] > 3, "TypeError"),
        (pc.field("tempo") > 3, "tempo"),
        (lambda fields: False, "No record"),
        ("tempo > 3", "No record"),
        ("__import__('os')", "no condition"),
    ]:
        with pytest.raises(ConfigError, match=word) as error:
            select(made, where)
        assert str(error.value).endswith(".")


def test_remote_fields_are_the_same(lengths: list[int]) -> None:
    for name in ("parquet", "webdataset"):
        store = write_latents(f"memory://fields-{name}", lengths, format_name=name)
        reader = FieldReader(store, ["key", "metadata"])
        assert [row["key"] for row in reader.read(np.arange(40))] == list(store.keys())
        assert reader.gather()["key"].to_pylist() == list(store.keys())


def test_a_damaged_shard_is_one_sentence(lengths: list[int], one_sentence) -> None:
    store = write_latents("memory://damaged", lengths)
    store.storage.write("shards/000002.parquet", b"PAR1 and no more")
    with pytest.raises(StorageError, match="damaged"):
        FieldReader(store).gather()
