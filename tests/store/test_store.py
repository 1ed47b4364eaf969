"""Reading a store: by key, in order, in crops, in other processes."""

from __future__ import annotations

import pickle
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path

import fsspec
import numpy as np
import pyarrow.parquet as pq
import pytest
import soundfile
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from store_files import (
    FORMATS,
    HOP,
    KEYS,
    METADATA,
    RATE,
    SECONDS,
    Latents,
    index_file,
    model_latent,
    write_store,
)

from latentmill.errors import ConfigError, ModelError, StorageError, StoreError
from latentmill.ops import mix
from latentmill.record import Record
from latentmill.storage.storage import Storage
from latentmill.store.commit import read_commits
from latentmill.store.index import Index, to_batch
from latentmill.store.schema import DATASET_PATH
from latentmill.store.seal import dataset_info
from latentmill.store.store import LatentStore, open_store


@contextmanager
def ranges_read() -> Iterator[list[int]]:
    """Lengths of the ranged reads; every other way to read a file is shut."""
    lengths: list[int] = []
    read_range = Storage.read_range

    def counted(self: Storage, path: str, offset: int, length: int) -> bytes:
        lengths.append(length)
        return read_range(self, path, offset, length)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Storage, "read_range", counted)
        for name in ("read", "read_if_exists", "open"):
            patch.delattr(Storage, name)
        yield lengths


def test_mapping(store: LatentStore) -> None:
    assert store.sealed
    assert len(store) == len(KEYS)
    assert list(store.keys()) == KEYS
    assert [record.key for record in store] == KEYS
    assert all(key in store for key in KEYS)
    for absent in ("", "drum", "drumsx", "broken", "too-short", "\U0010ffff", 3):
        assert absent not in store
    with pytest.raises(KeyError, match="broken"):
        store["broken"]
    with pytest.raises(KeyError):
        store.crop("broken", 0, 1)


def test_records(store: LatentStore, corpus: Path) -> None:
    for name in SECONDS:
        record = store[name.rpartition(".")[0]]
        expected = model_latent(corpus, name)
        assert record.latent.dtype == np.float16
        np.testing.assert_array_equal(record.latent, expected.astype(np.float16))
        assert record.num_samples == soundfile.info(corpus / name).frames
        assert record.source_uri == str(corpus / name)
        assert (record.sample_rate, record.source_sample_rate) == (RATE, RATE)
    assert store["album one/été"].metadata == {**METADATA, "text": "a caption — with a dash"}
    assert store["drums"].metadata == {}


@pytest.mark.parametrize("name", FORMATS[1:])
def test_all_formats_give_the_same_records(name: str, stores: dict[str, Path]) -> None:
    one, other = LatentStore(str(stores[FORMATS[0]])), LatentStore(str(stores[name]))
    for left, right in zip(one, other, strict=True):
        np.testing.assert_array_equal(left.latent, right.latent)
        names = [field.name for field in fields(Record) if field.name != "latent"]
        assert [getattr(left, n) for n in names] == [getattr(right, n) for n in names]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(data=st.data())
def test_a_crop_is_a_slice_and_reads_no_more(store: LatentStore, data: st.DataObject) -> None:
    key = data.draw(st.sampled_from(KEYS))
    whole = store[key].latent
    start = data.draw(st.integers(0, whole.shape[1] - 1))
    frames = data.draw(st.integers(1, whole.shape[1] - start))
    store.crop(key, 0, 1)  # opens the index
    with ranges_read() as lengths:
        crop = store.crop(key, start, frames)
    np.testing.assert_array_equal(crop, whole[:, start : start + frames])
    assert lengths == [frames * HOP * 2]


@pytest.mark.parametrize(("start", "frames"), [(-1, 2), (0, 0), (3, -1), (0, 864), (863, 1)])
def test_no_crop_beyond_the_latent(store: LatentStore, start: int, frames: int) -> None:
    assert store["drums"].frames == 863
    with pytest.raises(IndexError, match="drums has 863 frames"):
        store.crop("drums", start, frames)


def test_reading_a_sealed_store_needs_no_plan_and_no_commits(spoilable: Path) -> None:
    shutil.rmtree(spoilable / "plan")
    shutil.rmtree(spoilable / "commits")
    store = open_store(str(spoilable), device="cpu")
    assert [record.key for record in store] == KEYS
    assert store.decode("drums").shape == (1, round(2.5 * RATE))
    assert store.origin.frames.shape[0] == len(store.mean) == HOP
    with pytest.raises(StoreError, match=r"has no plan/plan\.json"):
        store.plan  # noqa: B018


def test_unsealed_equals_sealed(spoilable: Path) -> None:
    sealed = LatentStore(str(spoilable))
    records, info = list(sealed), sealed.info
    (spoilable / DATASET_PATH).unlink()
    index_file(spoilable).unlink()
    unsealed = LatentStore(str(spoilable))
    assert not unsealed.sealed
    # Files that an unsealed store does not have.
    alone = {"index": "index.arrow", "index_hash": None, "metadata": None, "metadata_hash": None}
    assert unsealed.info == info.model_copy(update=alone)
    assert list(unsealed.keys()) == KEYS
    for left, right in zip(unsealed, records, strict=True):
        np.testing.assert_array_equal(left.latent, right.latent)
    for key in KEYS:
        assert unsealed.entry(key) == sealed.entry(key)


@pytest.mark.parametrize("missing", [DATASET_PATH, "index.*", "origin.npy", "commits/000001.json"])
def test_a_store_is_complete_when_all_its_parts_are_there(spoilable: Path, missing: str) -> None:
    assert LatentStore(str(spoilable)).complete
    (path,) = spoilable.glob(missing)
    path.unlink()
    assert not LatentStore(str(spoilable)).complete


def test_an_unfinished_store_shows_what_is_committed(spoilable: Path) -> None:
    (spoilable / DATASET_PATH).unlink()
    first, *others = sorted((spoilable / "commits").iterdir())
    for path in others:
        path.unlink()
    store = LatentStore(str(spoilable))
    assert 0 < len(store) == len(list(store)) < len(KEYS)
    assert store.info.encoded == len(store)
    first.unlink()
    store = LatentStore(str(spoilable))
    assert (len(store), list(store), store.info.encoded, store.info.shards) == (0, [], 0, [])
    assert store.std.tolist() == [0] * HOP
    assert KEYS[0] not in store


def test_statistics_and_counts(store: LatentStore) -> None:
    frames = np.concatenate([record.latent for record in store], axis=1).astype(np.float64)
    info = store.info
    np.testing.assert_allclose(store.mean, frames.mean(axis=1), rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(store.std, frames.std(axis=1), rtol=1e-9)
    assert info.frames == frames.shape[1]
    assert (info.items, info.encoded, info.skipped, info.failed) == (27, 25, 1, 1)
    assert info.hours == pytest.approx(sum(SECONDS.values()) / 3600, abs=1e-5)
    assert sum(shard.rows for shard in info.shards) == 25
    assert dataset_info(store.plan, []).encoded == 0


def test_decode_and_mix(store: LatentStore, corpus: Path) -> None:
    drums = soundfile.read(corpus / "drums.wav", dtype="float32")[0]
    decoded = store.decode("drums")
    assert decoded.shape == (1, len(drums))
    np.testing.assert_allclose(decoded[0], drums, atol=2e-3)  # float16
    one, other = store["many/00"], store["many/01"]
    latent = mix([one.latent, other.latent], [1.0, 0.5], origin=store.origin)
    mixed = store.decode_latent(latent, one.num_samples)
    waves = [soundfile.read(corpus / f"many/0{n}.wav", dtype="float32")[0] for n in (0, 1)]
    np.testing.assert_allclose(mixed[0], waves[0] + 0.5 * waves[1], atol=2e-3)


def test_overlapping_chunks(corpus: Path, tmp_path: Path) -> None:
    store = write_store(
        str(tmp_path / "store"), corpus, format="parquet", stitch="none", chunk_seconds=0.5
    )
    record = store["drums"]
    assert record.latent.ndim == 3
    assert store.info.layout == "chunks"
    with pytest.raises(ConfigError, match="overlapping chunks"):
        store.crop("drums", 0, 1)


def test_another_model_is_refused(spoilable: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = spoilable / DATASET_PATH
    path.write_text(path.read_text().replace('"window": "sine"', '"window": "kaiser"'))
    with pytest.raises(
        ModelError,
        match=r"mdct is not the model that encoded .* \(window kaiser in the store, sine here\)",
    ):
        LatentStore(str(spoilable), device="cpu").model()


def test_pickled_copies_read_the_same(store: LatentStore) -> None:
    store.crop("drums", 0, 1)
    copy = pickle.loads(pickle.dumps(store))
    np.testing.assert_array_equal(copy["drums"].latent, store["drums"].latent)
    assert len(pickle.dumps(store)) < 500


def test_worker_processes(store: LatentStore) -> None:
    """A store that is in use, its index mapped, is forked into two workers."""
    expected = {record.key: record.latent for record in store}
    loader = torch.utils.data.DataLoader(
        Latents(store), batch_size=None, num_workers=2, multiprocessing_context="fork"
    )
    read = dict(iter(loader))
    assert list(read) == KEYS
    for key, latent in read.items():
        np.testing.assert_array_equal(latent, expected[key])


@pytest.mark.parametrize("format_name", FORMATS)
def test_a_store_in_memory(corpus: Path, stores: dict[str, Path], format_name: str) -> None:
    url = f"memory://{format_name}-store"
    try:
        store = write_store(url, corpus, format=format_name)
        local = LatentStore(str(stores[format_name]))
        assert store.info.shards == local.info.shards  # rows, bytes and hashes
        assert [r.key for r in store] == KEYS
        np.testing.assert_array_equal(store.crop("drums", 5, 7), local.crop("drums", 5, 7))
        np.testing.assert_array_equal(store.origin.frames, local.origin.frames)
        assert list(pickle.loads(pickle.dumps(store)).keys()) == KEYS
    finally:
        fsspec.filesystem("memory").rm(f"/{format_name}-store", recursive=True)


def test_origin(store: LatentStore) -> None:
    origin = store.origin.frames
    assert (origin.dtype, origin.shape) == (np.float32, (HOP, store.chunking.samples // HOP + 1))
    assert not origin.any()  # a linear model


def flip(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 0x10
    path.write_bytes(data)


def test_a_damaged_latent(spoilable: Path) -> None:
    place = LatentStore(str(spoilable)).entry("many/03")
    flip(spoilable / place.shard, place.offset + place.length // 2)
    store = LatentStore(str(spoilable))
    with pytest.raises(StorageError) as raised:
        store["many/03"]
    assert f"{place.shard} is damaged at record many/03: the latent does not" in str(raised.value)
    assert store["many/02"].key == "many/02"


def test_damaged_fields(spoilable: Path) -> None:
    """A flipped bit in what lies beside the latents."""
    store = LatentStore(str(spoilable))
    place = store.entry("many/03")
    shard = spoilable / place.shard
    data = shard.read_bytes()
    if place.fields_offset >= 0:
        flip(shard, place.fields_offset)
    else:  # a page of a column that is not the latent
        column = pq.read_metadata(shard).row_group(0).column(6)
        flip(shard, column.data_page_offset + column.total_compressed_size - 2)
    assert len(data) == shard.stat().st_size
    with pytest.raises(StorageError, match=place.shard):
        store["many/03"]


def test_fields_of_another_record(store: LatentStore) -> None:
    """An index that places the latent right and the fields beside it wrong."""
    place, other = store.entry("many/03"), store.entry("many/04")
    assert place.shard == other.shard
    wrong = replace(
        place,
        row=other.row,
        fields_offset=other.fields_offset,
        fields_length=other.fields_length,
    )
    with pytest.raises(StorageError, match="at record many/03: the fields belong to many/04"):
        store.read(wrong)


def test_a_shard_cut_short(spoilable: Path) -> None:
    store = LatentStore(str(spoilable))
    place = store.entry("many/03")
    shard = spoilable / place.shard
    shard.write_bytes(shard.read_bytes()[: place.offset + place.length - 1])
    for read in (lambda: store["many/03"], lambda: store.crop("many/03", place.frames - 1, 1)):
        with pytest.raises(
            StorageError, match=r"is damaged at record many/03: the data is truncated"
        ):
            read()


def test_a_missing_shard(spoilable: Path) -> None:
    store = LatentStore(str(spoilable))
    place = store.entry("many/03")
    (spoilable / place.shard).unlink()
    with pytest.raises(StorageError, match=f"Cannot read .*{place.shard}: No such file"):
        store["many/03"]


def test_no_store(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "absent"):
        with pytest.raises(StoreError, match="is not a latentmill store: check the path"):
            open_store(str(folder))


@pytest.mark.parametrize(
    ("path", "data", "message"),
    [
        (DATASET_PATH, b"{", r"dataset\.json is damaged: delete it"),
        (DATASET_PATH, b'{"format_version": 9}', "has format version 9, .* reads 1 to 3: use"),
        ("index.*", None, r"index\.\w+\.arrow is missing or damaged: run the same encode"),
        ("index.*", b"ARROW1\0\0 what?", r"index\.\w+\.arrow is missing or damaged"),
        ("index.*", b"", r"index\.\w+\.arrow is missing or damaged"),
    ],
)
def test_damaged_documents(spoilable: Path, path: str, data: bytes | None, message: str) -> None:
    (file,) = spoilable.glob(path)
    file.unlink()
    if data is not None:
        file.write_bytes(data)
    with pytest.raises(StoreError, match=message):
        len(open_store(str(spoilable)))


def test_index_file_round_trip(store: LatentStore) -> None:
    commits = read_commits(Storage(store.url)).values()
    index = Index.from_batches([to_batch(commit) for commit in commits])
    again = Index.from_file(index.to_bytes())
    assert [again.entry(n) for n in range(len(index))] == [store.entry(key) for key in KEYS]
    assert len(Index.from_file(Index.from_batches([]).to_bytes())) == 0
