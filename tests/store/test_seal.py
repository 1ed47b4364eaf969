"""The seal: what dataset.json says of a store, and when it is out of date."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from latentmill.errors import StorageError, StoreError
from latentmill.plan import load
from latentmill.storage.storage import Storage
from latentmill.store.commit import SealHash, iter_commits
from latentmill.store.npy import npy_bytes
from latentmill.store.schema import CARD_PATH, DATASET_PATH, ORIGIN_PATH
from latentmill.store.seal import current_seal, dataset_info, read_origin, read_seal, write_seal
from latentmill.store.store import LatentStore
from support.latent_store import HOP, RATE, latent_of, write_again, write_latents

LENGTHS = [900, 40, 1500, 7, 2000, 300]


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    write_latents(str(tmp_path / "store"), LENGTHS, per_unit=4, failed=[3])
    return Storage(str(tmp_path / "store"))


def sealed(storage: Storage) -> dict[str, object]:
    document: dict[str, object] = json.loads(storage.read(DATASET_PATH))
    return document


def test_it_sums_up_the_store(storage: Storage) -> None:
    document = sealed(storage)
    names = ("items", "encoded", "failed", "skipped", "frames")
    assert [document[name] for name in names] == [6, 5, 1, 0, 900 + 40 + 1500 + 2000 + 300]
    samples = sum(LENGTHS) * HOP - 7 * HOP - 5 * 7
    assert document["hours"] == round(samples / RATE / 3600, 6)
    latents = [latent_of(n, length) for n, length in enumerate(LENGTHS) if n != 3]
    whole = np.concatenate(latents, axis=1).astype(np.float64)
    assert np.allclose(document["mean"], whole.mean(axis=1), rtol=1e-12)
    assert np.allclose(document["std"], whole.std(axis=1), rtol=1e-12)
    assert document["format_version"] == 2
    assert "revisions" not in document or document["revisions"] == {}
    assert storage.read(DATASET_PATH).startswith(b'{\n  "')
    again = write_again(storage.root, [1], [latent_of(n, m) for n, m in enumerate(LENGTHS)])
    assert again.info.revisions == {"000001": 1}
    assert (again.info.encoded, again.info.failed) == (5, 1)


def test_only_stores_that_need_it_have_the_newer_format(storage: Storage) -> None:
    info = read_seal(storage)
    assert info is not None
    entry = {"version": 1, "hashes": ["0" * 32], "records": 1, "names": ["bpm"]}
    annotated = type(info).model_validate({**sealed(storage), "annotation": entry})
    write_seal(storage, annotated)
    assert sealed(storage)["format_version"] == 3
    write_seal(storage, annotated.model_copy(update={"annotation": None}))
    assert sealed(storage)["format_version"] == 2
    assert "annotation" not in sealed(storage)


def test_it_is_current_while_its_files_are_what_it_lists(storage: Storage) -> None:
    seal_hash = SealHash()
    for commit in iter_commits(storage):
        seal_hash.add(commit)
    info = read_seal(storage)
    assert info is not None
    assert info.metadata is not None
    assert current_seal(storage, seal_hash.hexdigest()) == info
    assert current_seal(storage, "0" * 32) is None
    for path in (info.index, info.metadata, CARD_PATH):
        data = storage.read(path)
        if path != CARD_PATH:  # its content is for people
            storage.write(path, data[:-1] + bytes([data[-1] ^ 1]))
            assert current_seal(storage, info.seal) is None
        storage.delete(path)
        assert current_seal(storage, info.seal) is None
        storage.write(path, data)
        assert current_seal(storage, info.seal) == info
    older = info.model_copy(update={"metadata": None, "metadata_hash": None})
    write_seal(storage, older)
    assert current_seal(storage, info.seal) is None


def test_a_commit_of_another_model_is_refused(
    storage: Storage, one_sentence: Callable[[BaseException], str]
) -> None:
    plan = load(storage)
    assert plan is not None
    document = {**plan.fingerprint, "model": {**plan.fingerprint["model"], "latent_channels": 5}}
    with pytest.raises(StoreError, match="has 4 channels instead of 5") as error:
        dataset_info(replace(plan, fingerprint=document), iter_commits(storage))
    assert one_sentence(error.value)


def test_an_origin_that_cannot_be_read_is_named(
    storage: Storage, one_sentence: Callable[[BaseException], str]
) -> None:
    data = storage.read(ORIGIN_PATH)
    assert read_origin(storage).shape == (4, 16)
    storage.write(ORIGIN_PATH, data[:20])
    with pytest.raises(StorageError, match=r"origin\.npy is damaged: restore") as error:
        read_origin(storage)
    assert one_sentence(error.value)
    for shape in ((), (4,), (4, 0), (1, 4, 16)):
        storage.write(ORIGIN_PATH, npy_bytes(np.zeros(shape, np.float32)))
        with pytest.raises(StorageError, match=r"origin\.npy is damaged: restore"):
            read_origin(storage)
    storage.write(ORIGIN_PATH, npy_bytes(np.zeros((3, 16), np.float32)))
    with pytest.raises(StorageError, match=r"origin\.npy is damaged: restore"):
        _ = LatentStore(storage.root, device="cpu").origin
    path = Path(storage.root) / ORIGIN_PATH
    path.unlink()
    with pytest.raises(StorageError, match=r"origin\.npy is missing: restore it") as error:
        read_origin(storage)
    assert one_sentence(error.value)
    path.mkdir()
    with pytest.raises(StorageError, match="directory") as error:
        read_origin(storage)
    assert "is missing" not in one_sentence(error.value)
