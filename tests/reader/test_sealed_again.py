"""Readers of a store whose units are encoded again: the bytes of one seal, never a mix of two."""

from __future__ import annotations

import errno
import json
import os
import pickle
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
import pytest

import latentmill as lm
from latentmill.errors import StorageError, StoreError
from latentmill.reader import cache as cache_module
from latentmill.reader.crops import CropReader
from latentmill.reader.fields import FieldReader
from latentmill.reader.stems import AllStems
from latentmill.storage.storage import Storage
from latentmill.store import store as store_module
from latentmill.store.formats import SHARD_FORMATS
from latentmill.store.store import LatentStore
from support.latent_store import latent_of, write_again, write_latents

FORMATS = list(SHARD_FORMATS)
LENGTHS = [30] * 16  # two units of eight items
CROP = 8
AFTER = 16  # numbers of `latent_of` that other latents are made by


def latents(changed: int | None = None, frames: int = 30) -> list[np.ndarray]:
    """Those of all items, of which one may be another than at first."""
    made = [latent_of(number, length) for number, length in enumerate(LENGTHS)]
    if changed is not None:
        made[changed] = latent_of(changed + AFTER, frames)
    return made


@pytest.fixture(params=["local", "memory", "s3"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "local":
        return str(tmp_path / "store")
    if request.param == "s3":
        return f"{request.getfixturevalue('s3_bucket')}/store"
    return f"memory://{uuid.uuid4().hex}/store"


@pytest.mark.parametrize("name", FORMATS)
def test_a_cache_never_gives_what_was_superseded(
    url: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some blocks of the old shards are in it, and the new shards have the same sizes."""
    monkeypatch.setattr(cache_module, "BLOCK", 512)
    monkeypatch.setattr(cache_module, "SPAN", 1)  # read no neighbours of a block
    write_latents(url, LENGTHS, format_name=name)
    options: dict[str, Any] = {"crop": CROP, "mode": "start", "cache": tmp_path / "cache"}
    early = lm.LatentDataset(url, **options)
    for number in (3, 9):
        np.testing.assert_array_equal(early[number].latents, latents()[number][:, :CROP])
    now = latents(changed=3)
    write_again(url, [0], now)
    late = lm.LatentDataset(url, **options)
    if not Storage(url).local:  # a file that is open stays readable
        assert early[0].key == "item/00000"  # is in no block yet, so the seal is read again
    else:
        early = pickle.loads(pickle.dumps(early))
    for dataset in (late, early, pickle.loads(pickle.dumps(early))):
        for number, sample in enumerate(dataset.__getitems__(list(range(16)))):
            assert sample.key == f"item/{number:05d}"
            np.testing.assert_array_equal(sample.latents, now[number][:, :CROP])


@pytest.mark.parametrize("name", FORMATS)
def test_fields_are_gathered_where_they_are_now(tmp_path: Path, name: str) -> None:
    url = str(tmp_path / "store")
    write_latents(url, LENGTHS, format_name=name)
    reader = FieldReader(LatentStore(url), ("key", "num_samples"))
    write_again(url, [0, 1], latents(changed=3))
    assert reader.gather()["key"].to_pylist() == [f"item/{n:05d}" for n in range(16)]


def test_a_long_latent_is_of_one_seal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that is read piece by piece goes on if its latent is the same, and else stops."""
    monkeypatch.setattr(store_module, "_WHOLE_BYTES", 100)
    url = write_latents(str(tmp_path / "store"), LENGTHS).url
    store = LatentStore(url)
    same, other = store.source("item/00002"), store.source("item/00003")
    write_again(url, [0], latents(changed=3))
    np.testing.assert_array_equal(same.read(5, 20), latents()[2][:, 5:25])
    with pytest.raises(StoreError, match="item/00003 was encoded again while it was read"):
        other.read(5, 20)
    again = store.source("item/00003").read(0, 30)
    np.testing.assert_array_equal(again, latent_of(3 + AFTER, 30))


CONDITIONS: dict[str, Any] = {
    "function": lambda fields: fields["metadata"]["number"] in (9, 12),
    "expression": pc.field("key").isin(["item/00009", "item/00012"]),
    "text": "number in [9, 12]",
    "dotted name": "song.at in [9, 12]",
    "annotated JSON": "tag == 'chosen'",
}


def write_half(url: str, tmp_path: Path) -> None:
    """A store whose first unit has only failed items; number 9 and 12 of the second are chosen."""
    write_latents(
        url,
        LENGTHS,
        failed=range(8),
        metadata=[{"number": number, "song": {"at": number}} for number in range(16)],
    )
    tags = {f"item/{n:05d}": "chosen" if n in (9, 12) else n for n in range(8, 16)}
    lines = [json.dumps({"key": key, "tag": tag}) for key, tag in tags.items()]
    (tmp_path / "tags.jsonl").write_text("\n".join(lines))
    lm.annotate(url, tmp_path / "tags.jsonl")


@pytest.mark.parametrize("where", CONDITIONS)
def test_conditions_choose_records_of_the_seal_that_is_read(
    url: str, where: str, tmp_path: Path
) -> None:
    """Items were encoded since a store was opened; their records come before those chosen."""
    write_half(url, tmp_path)
    store = lm.open(url)
    assert len(store) == 8
    write_again(url, [0], latents())
    options: dict[str, Any] = {"crop": CROP, "mode": "start", "where": CONDITIONS[where]}
    for stores in (store, [lm.open(url), store]):
        dataset = lm.LatentDataset(stores, **options)
        for number, sample in enumerate(dataset[n] for n in range(len(dataset))):
            wanted = (9, 12)[number % 2]
            assert sample.key == f"item/{wanted:05d}"
            assert sample.metadata["number"] == wanted
            np.testing.assert_array_equal(sample.latents, latents()[wanted][:, :CROP])
    assert len(dataset) == 4


@pytest.mark.parametrize("units", [[0], [0, 1]])
def test_conditions_when_shards_of_the_earlier_seal_are_gone(
    tmp_path: Path, units: list[int]
) -> None:
    url = write_latents(str(tmp_path / "store"), LENGTHS, failed=range(8)).url
    store, again = lm.open(url), lm.open(url)
    assert len(store) == len(again) == 8
    write_again(url, units, latents())
    dataset = lm.LatentDataset(store, crop=CROP, where=CONDITIONS["function"])
    assert [dataset[n].key for n in range(len(dataset))] == ["item/00009", "item/00012"]
    stems = lm.StemDataset(again, AllStems(("drums",)), crop=CROP, active_db=None)
    assert [stems.stems(n).keys for n in range(len(stems))] == [
        tuple(f"item/{4 * group + n:05d}" for n in range(4)) for group in range(4)
    ]


def test_fields_are_gathered_of_the_items_of_a_reader_or_not_at_all(tmp_path: Path) -> None:
    url = write_latents(str(tmp_path / "store"), LENGTHS, failed=range(8)).url
    reader = FieldReader(LatentStore(url), ["key"])
    write_again(url, [0], latents())
    with pytest.raises(StoreError, match="sealed again with other items"):
        reader.gather()


READERS: dict[str, Callable[[str], Any]] = {
    "samples": lambda url: lm.LatentDataset(url, crop=CROP),
    "stream": lambda url: lm.LatentStream(url, crop=CROP),
    "stems": lambda url: lm.StemDataset(url, AllStems(("drums",)), crop=CROP, active_db=None),
    "crops": lambda url: CropReader(LatentStore(url)),
    "fields": lambda url: FieldReader(LatentStore(url)),
}


@pytest.mark.parametrize("reader", READERS)
def test_a_copy_in_a_worker_reads_the_items_that_it_was_made_for(
    reader: str, tmp_path: Path
) -> None:
    """The store is sealed again between pickling and unpickling, with as many records."""
    url = write_latents(str(tmp_path / "store"), LENGTHS).url
    copy = pickle.dumps(READERS[reader](url))
    write_again(url, [0], latents(changed=3))
    pickle.loads(copy)  # other latents of the same lengths, in another shard
    write_again(url, [0], latents(changed=3, frames=20))
    with pytest.raises(StoreError, match="sealed again with other items"):
        pickle.loads(copy)


def test_a_reader_goes_on_after_its_store_has_seen_a_seal_that_is_gone_too(tmp_path: Path) -> None:
    url = write_latents(str(tmp_path / "store"), LENGTHS).url
    dataset = lm.LatentDataset(store := LatentStore(url), crop=CROP, mode="start", metadata=False)
    write_again(url, [0], latents(changed=3))
    store["item/00003"]  # the shard is missing, so it shows the second seal now
    write_again(url, [0], latents(changed=4))
    np.testing.assert_array_equal(dataset[4].latents, latents(changed=4)[4][:, :CROP])


def test_a_reader_keeps_its_keys_when_its_store_shows_other_items(tmp_path: Path) -> None:
    url = write_latents(str(tmp_path / "store"), LENGTHS).url
    store = LatentStore(url)
    dataset = lm.LatentDataset(store, crop=CROP, mode="start", metadata=False)
    stems = lm.StemDataset(store, AllStems(("drums",)), crop=CROP, active_db=None)
    first = dataset[9]
    write_again(url, [0], latents(), failed=[3])
    assert store["item/00004"].key and len(store) == 15
    assert dataset.records == stems.records == [16]
    for sample in (first, dataset[9]):  # its shard is still there
        assert sample.key == "item/00009"
        np.testing.assert_array_equal(sample.latents, latents()[9][:, :CROP])
    assert stems.stems(2).keys == ("item/00008", "item/00009", "item/00010", "item/00011")
    for reader in (dataset, stems):
        with pytest.raises(StoreError, match="sealed again with other items"):
            reader[0]
        with pytest.raises(StoreError, match="sealed again with other items"):
            pickle.loads(pickle.dumps(reader))


@pytest.mark.parametrize("crop", [CROP, None])
def test_a_file_that_another_nfs_client_has_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, crop: int | None
) -> None:
    """Reading it gives ESTALE, although it is open: the current one is read instead."""
    url = write_latents(str(tmp_path / "store"), LENGTHS).url
    dataset = lm.LatentDataset(url, crop=crop, mode="start", metadata=False)
    assert dataset[3].key == "item/00003"  # opens the shard
    preadv = os.preadv

    def on_nfs(file: int, *rest: Any) -> int:
        if os.fstat(file).st_nlink == 0:
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        return preadv(file, *rest)

    monkeypatch.setattr(os, "preadv", on_nfs)
    now = latents(changed=3)
    write_again(url, [0], now)
    np.testing.assert_array_equal(dataset[3].latents, now[3][:, :crop])
    for shard in (tmp_path / "store/shards").iterdir():
        shard.unlink()
    with pytest.raises(StorageError, match=r"cannot read .*[Ss]tale"):
        dataset[3]


def test_a_record_is_found_though_the_store_is_sealed_again_while_it_is_looked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = write_latents(str(tmp_path / "store"), LENGTHS).url
    store, reload = LatentStore(url), LatentStore.reload
    assert len(store) == 16
    write_again(url, [0], latents(changed=3))

    def reload_late(self: LatentStore) -> bool:
        found = reload(self)
        assert len(self) == 16
        monkeypatch.setattr(LatentStore, "reload", reload)
        write_again(url, [0], latents(changed=4))
        return found

    monkeypatch.setattr(LatentStore, "reload", reload_late)
    np.testing.assert_array_equal(store["item/00004"].latent, latents(changed=4)[4])
