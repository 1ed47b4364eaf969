"""Crops: the right frames, only their bytes, silence behind the end."""

from __future__ import annotations

import gc
import multiprocessing
import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from latentmill.errors import ConfigError, StorageError
from latentmill.reader import crops as crops_module
from latentmill.reader import shards
from latentmill.reader.crops import CropReader
from latentmill.reader.open_files import OpenFiles
from latentmill.store.store import LatentStore
from support.latent_store import latent_of, write_again, write_latents
from support.open_files import open_files


def whole(store: LatentStore, row: int) -> np.ndarray:
    return store[store.index.key(row)].latent.astype(np.float32)


def expected(store: LatentStore, row: int, start: int, frames: int) -> tuple[np.ndarray, int]:
    """A crop by the slow way: the whole latent, continued by the origin."""
    latent = whole(store, row)
    end = start + frames
    missing = max(0, end - latent.shape[1])
    silence = store.origin.of_length(end)[:, latent.shape[1] :]
    long = np.concatenate([latent, silence], axis=1) if missing else latent
    return long[:, start:end], frames - missing


def read(reader: CropReader, *crops: tuple[int, int], frames: int) -> tuple[np.ndarray, np.ndarray]:
    """Crops, each given as row and first frame."""
    rows, starts = np.array(crops, np.int64).reshape(-1, 2).T
    return reader.read_block(rows, starts, frames)


@given(data=st.data())
def test_crops_are_those_of_the_whole_latent(_made: dict[str, str], data: st.DataObject) -> None:
    store = LatentStore(_made[data.draw(st.sampled_from(sorted(_made)))])
    reader = CropReader(store)
    crops, frames = [], data.draw(st.integers(1, 350))
    for _ in range(data.draw(st.integers(0, 5))):
        row = data.draw(st.integers(0, len(store) - 1))
        crops.append((row, data.draw(st.integers(0, int(reader.frames[row]) - 1))))
    block, have = read(reader, *crops, frames=frames)
    assert block.dtype == np.float32
    assert block.shape == (len(crops), frames, 4)
    for crop, latent, length in zip(crops, block, have, strict=True):
        wanted, there = expected(store, *crop, frames)
        assert np.array_equal(latent.T, wanted)
        assert length == there


@pytest.mark.parametrize("viewed_bytes", [0, 1 << 17])  # 0: all are read from the mapped file
@pytest.mark.parametrize("rows", [[], [3], [5, 0, 39, 5]])
def test_whole_latents(
    made: LatentStore, monkeypatch: pytest.MonkeyPatch, viewed_bytes: int, rows: list[int]
) -> None:
    monkeypatch.setattr(crops_module, "VIEWED_BYTES", viewed_bytes)
    latents = list(CropReader(made).read_whole(np.array(rows, np.int64)))
    for row, latent in zip(rows, latents, strict=True):
        assert latent.dtype == np.float32
        assert np.array_equal(latent, whole(made, row))


def test_long_latents_are_mapped_and_short_ones_are_read(
    made: LatentStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Long: 64 frames of 4 half floats and more, on average."""
    monkeypatch.setattr(crops_module, "VIEWED_BYTES", 64 * 4 * 2)
    reads: list[int] = []
    monkeypatch.setattr(shards.ShardReader, "fill", lambda _, pieces: reads.append(len(pieces)))
    reader = CropReader(made)
    frames = reader.frames
    for rows, read_ahead in [
        (np.flatnonzero(frames == 64)[:1], []),
        (np.flatnonzero(frames < 64)[:1], [1]),
        (np.flatnonzero(frames < 64)[:2], [2]),
    ]:
        reads.clear()
        reader.read_whole(rows)
        assert [count for count in reads if count] == read_ahead


def test_stores_of_one_item_and_of_none(tmp_path: Path) -> None:
    store = write_latents(str(tmp_path / "one"), [9])
    (latent,), have = read(CropReader(store), (0, 2), frames=5)
    assert have.tolist() == [5]
    assert np.array_equal(latent.T, latent_of(0, 9)[:, 2:7])
    none = CropReader(write_latents(str(tmp_path / "none"), [9], failed=[0]))
    assert none.channels == 0
    assert read(none, frames=5)[0].shape == (0, 5, 0)


def test_a_long_latent_is_found_where_it_is_when_it_is_reached(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its unit is encoded again between the call and the reading, into another order."""
    monkeypatch.setattr(crops_module, "VIEWED_BYTES", 0)
    store = write_latents(str(tmp_path / "store"), [9] * 4)
    latents = CropReader(store).read_whole(np.array([3, 1]))
    now = [latent_of(number + 10, 9) for number in range(4)]
    write_again(store.url, [0], now)
    for found, row in zip(latents, [3, 1], strict=True):
        assert np.array_equal(found, now[row])


def test_silence_is_the_origin_and_not_zeros(made: LatentStore) -> None:
    reader = CropReader(made)
    (latent,), have = read(reader, (reader.row("item/00000"), 0), frames=64)
    assert have.tolist() == [1]
    assert np.array_equal(latent.T[:, 1:], made.origin.of_length(64)[:, 1:])
    assert latent[-1].tolist() == [0.75] * 4  # the border of silence


def test_only_the_crops_bytes_are_read(made: LatentStore, monkeypatch: pytest.MonkeyPatch) -> None:
    reader = CropReader(made)
    reads: list[int] = []
    real = os.preadv

    def counted(file: int, buffers: list[memoryview], offset: int) -> int:
        reads.append(sum(len(buffer) for buffer in buffers))
        return real(file, buffers, offset)

    monkeypatch.setattr(os, "preadv", counted)
    rows = np.flatnonzero(reader.frames >= 40)
    reader.read_block(rows, np.full(len(rows), 3), 20)
    assert reads == [20 * 4 * 2] * len(rows)


@pytest.mark.parametrize("crop", [(40, 0), (-1, 0), (0, -1), (0, 1)])
def test_what_is_not_there_is_an_index_error(made: LatentStore, crop: tuple[int, int]) -> None:
    reason = "row out of range: use 0 to 39" if crop[0] in (40, -1) else "must start inside"
    with pytest.raises(IndexError, match=reason):
        read(CropReader(made), crop, frames=8)
    with pytest.raises(KeyError):
        CropReader(made).row("no such key")


def test_few_files_are_open_at_once(made: LatentStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(OpenFiles, "limit", staticmethod(lambda: 2))
    reader = CropReader(made)
    gc.collect()  # readers of other tests
    before = open_files(made.url)
    for _ in range(2):
        block, _ = reader.read_block(np.arange(len(made)), np.zeros(len(made), np.int64), 8)
    assert len(open_files(made.url) - before) <= 2
    assert np.array_equal(block[5, :5].T, whole(made, 5)[:, :5])
    del reader
    assert open_files(made.url) <= before


def test_a_shard_of_another_size_stops_reading(
    made: LatentStore, tmp_path: Path, one_sentence
) -> None:
    for change in (b"", b"more"):
        folder = tmp_path / f"store{len(change)}"
        shutil.copytree(made.url, folder)
        shard = next((folder / "shards").iterdir())
        data = shard.read_bytes()
        shard.write_bytes(data + change if change else data[: len(data) // 2])
        store = LatentStore(str(folder))
        with pytest.raises(StorageError, match="does not have the size") as error:
            read(CropReader(store), *((row, 0) for row in range(len(store))), frames=1)
        one_sentence(error.value)


def test_a_missing_shard_is_one_sentence(made: LatentStore, tmp_path: Path, one_sentence) -> None:
    folder = Path(shutil.copytree(made.url, tmp_path / "store"))
    shutil.rmtree(folder / "shards")
    with pytest.raises(StorageError) as error:
        read(CropReader(LatentStore(str(folder))), (0, 0), frames=1)
    assert "No such file" in one_sentence(error.value)


def test_a_remote_store_reads_the_same_in_one_batch(
    lengths: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    store = write_latents("memory://crops", lengths)
    reader = CropReader(store)
    batches: list[int] = []
    real = type(store.storage).read_ranges
    monkeypatch.setattr(
        type(store.storage),
        "read_ranges",
        lambda self, ranges: batches.append(len(ranges)) or real(self, ranges),
    )
    crops = [(row, 0) for row in range(len(store))]
    block, _ = read(reader, *crops, frames=64)
    assert batches == [len(store)]
    for crop, latent in zip(crops, block, strict=True):
        assert np.array_equal(latent.T, expected(store, *crop, 64)[0])
    batches.clear()
    latents = reader.read_whole(np.array([5, 3]))
    assert batches == [2]
    assert np.array_equal(next(latents), whole(store, 5))
    store.storage.write("shards/000001.parquet", b"cut")
    with pytest.raises(StorageError, match="does not have the size"):
        read(CropReader(store), *crops, frames=64)


def test_chunks_and_codes_are_refused(tmp_path: Path, one_sentence) -> None:
    chunks = write_latents(
        str(tmp_path / "chunks"), [8], latents=[np.zeros((2, 4, 8), np.float16)], stitch="none"
    )
    codes = write_latents(str(tmp_path / "codes"), [8], model={"output": "codes"})
    for store, word in ((chunks, "stitch none"), (codes, "codes")):
        with pytest.raises(ConfigError, match=word) as error:
            CropReader(store)
        one_sentence(error.value)


def _sum_of(reader: CropReader) -> float:
    block, _ = reader.read_block(np.arange(40), np.zeros(40, np.int64), 8)
    return float(block.sum())


def test_a_reader_may_be_forked_and_sent(_made: dict[str, str]) -> None:
    reader = CropReader(LatentStore(_made["parquet"]))
    here = _sum_of(reader)
    files = open_files(_made["parquet"])
    assert files
    assert len(pickle.dumps(reader)) < 1000
    assert _sum_of(pickle.loads(pickle.dumps(reader))) == here
    for way in ("fork", "spawn"):
        with multiprocessing.get_context(way).Pool(1) as pool:
            assert pool.map(_sum_of, [reader, reader]) == [here, here]
    assert _sum_of(reader) == here  # its files are still its own
    assert files <= open_files(_made["parquet"])


def test_an_unsealed_store_reads_too(tmp_path: Path, lengths: list[int]) -> None:
    store = write_latents(str(tmp_path / "unsealed"), lengths, sealed=False)
    (latent,), _ = read(CropReader(store), (4, 0), frames=8)
    assert np.array_equal(latent.T, expected(store, 4, 0, 8)[0])
