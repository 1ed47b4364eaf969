"""A damaged index is one sentence to whoever reads the store, and a second run repairs it."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from store_files import MODEL_OPTIONS, SECONDS, write_corpus

from latentmill import LatentDataset
from latentmill.errors import StorageError, StoreError
from latentmill.run.run import encode
from latentmill.store import index as index_module
from latentmill.store.store import LatentStore, open_store
from latentmill.store.verify import verify
from support.in_process import in_process

Damage = Callable[[bytearray, random.Random], bytes]


def cut(data: bytearray, rng: random.Random) -> bytes:
    return bytes(data[: rng.randrange(len(data))])


def flip(data: bytearray, rng: random.Random) -> bytes:
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return bytes(data)


def zeros(data: bytearray, rng: random.Random) -> bytes:
    start = rng.randrange(len(data))
    data[start : start + 64] = bytes(len(data[start : start + 64]))
    return bytes(data)


def ones(data: bytearray, rng: random.Random) -> bytes:
    start = rng.randrange(0, len(data) - 8) // 8 * 8
    data[start : start + 8] = b"\xff" * 8
    return bytes(data)


def moved(data: bytearray, rng: random.Random) -> bytes:
    start = rng.randrange(len(data))
    return bytes(data[start:] + data[:start])


DAMAGES: tuple[Damage, ...] = (cut, flip, zeros, ones, moved)


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A corpus, and a store of it."""
    songs = write_corpus(tmp_path_factory.mktemp("songs"))
    out = tmp_path_factory.mktemp("store") / "out"
    run(songs, out)
    return songs, out


def run(songs: Path, out: Path) -> None:
    with in_process():
        encode(str(songs), str(out), model_options=MODEL_OPTIONS, device="cpu", min_seconds=0.001)


def index_file(store: Path) -> Path:
    return store / json.loads((store / "dataset.json").read_text())["index"]


def damaged(whole: bytes, count: int) -> Iterator[bytes]:
    for number in range(count):
        rng = random.Random(number)
        data = DAMAGES[number % len(DAMAGES)](bytearray(whole), rng)
        if data != whole:
            yield data


def read_all(store: LatentStore) -> None:
    """Everything that is read through the index."""
    assert len(list(store.keys())) == len(store)
    for record in store:
        store.crop(record.key, 0, 1)
    dataset = LatentDataset(store, crop=4)
    for number in range(len(dataset)):
        dataset[number]


@pytest.mark.parametrize("kind", ["small", "format version 1", "large"])
def test_each_damage_is_one_sentence(
    stores: tuple[Path, Path], tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A large index is mapped unchecked: there a damage may show late, or look like the shard's."""
    store = Path(shutil.copytree(stores[1], tmp_path / "store"))
    path = index_file(store)
    checked = kind == "small"
    if kind == "large":
        monkeypatch.setattr(index_module, "CHECKED_BYTES", 0)
    elif kind == "format version 1":
        document = json.loads((store / "dataset.json").read_text())
        (store / "dataset.json").write_text(json.dumps({**document, "index_hash": None}))
    told = 0
    whole = path.read_bytes()
    for data in damaged(whole, 60 if checked else 120):
        path.write_bytes(data)
        try:
            read_all(open_store(str(store), device="cpu"))
        except StoreError as error:
            told += 1
            assert f"{path} is missing or damaged: run the same encode command" in str(error)
        except StorageError as error:
            assert not checked
            assert f"{store}/" in str(error)
        except KeyError:  # the order of the keys is broken
            assert not checked
        else:
            assert not checked
    assert told > 40


def test_a_second_run_writes_a_damaged_index_again(
    stores: tuple[Path, Path], tmp_path: Path
) -> None:
    songs, original = stores
    store = Path(shutil.copytree(original, tmp_path / "store"))
    path = index_file(store)
    whole = path.read_bytes()
    for data in (b"", *damaged(whole, 5)):
        path.write_bytes(data)
        faults = verify(open_store(str(store), device="cpu")).faults
        assert any(f"{path.name} is missing or damaged" in fault for fault in faults)
        run(songs, store)
        assert path.read_bytes() == whole
        assert len(list(open_store(str(store), device="cpu"))) == len(SECONDS)
