"""Names in a store are written once: a unit that is encoded again leaves what readers have."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from latentmill.engine import worker as worker_module
from latentmill.errors import StorageError
from latentmill.reader.dataset import LatentDataset
from latentmill.run import run as run_module
from latentmill.store.formats import SHARD_FORMATS
from latentmill.store.store import LatentStore, open_store
from latentmill.store.verify import verify
from support import runs
from support.in_process import encode, spoil, tone

pytestmark = pytest.mark.usefixtures("inline")

FORMATS = list(SHARD_FORMATS)


@pytest.fixture
def songs(tmp_path: Path) -> Path:
    for number in range(3):
        tone(tmp_path / "songs" / f"{number}.wav", 3000)
    return tmp_path / "songs"


def killed(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


def change(songs: Path, number: int, level: float) -> None:
    """The same length with other samples, so that a tar of its latent has the same size."""
    path = songs / f"{number}.wav"
    tone(path, 3000, level)
    os.utime(path, ns=(1, round(level * 1000)))


def unit_of(store: LatentStore, key: str) -> str:
    return Path(store.entry(key).shard).name


@pytest.mark.parametrize("name", FORMATS)
def test_a_seal_that_is_older_than_the_commits_is_replaced_by_any_run(
    songs: Path, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a unit whose items had all failed no shard tells that its commit has changed."""
    store = tmp_path / "store"
    spoil(songs / "1.wav")
    encode(songs, store, format=name)
    assert list(open_store(str(store)).keys()) == ["0", "2"]
    tone(songs / "1.wav", 3000)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(run_module, "seal", killed)
        encode(songs, store, format=name, retry_failed=True)
    assert not open_store(str(store)).complete
    assert any("(encoded, failed" in fault for fault in verify(open_store(str(store))).faults)
    assert encode(songs, store, format=name).info.encoded == 3
    assert list(open_store(str(store)).keys()) == ["0", "1", "2"]
    assert open_store(str(store)).complete
    runs.assert_whole(store)
    before = {path: path.stat().st_mtime_ns for path in store.rglob("*") if path.is_file()}
    encode(songs, store, format=name)  # now there is nothing left to do
    after = {path: path.stat().st_mtime_ns for path in store.rglob("*") if path.is_file()}
    gone = {path.relative_to(store).as_posix() for path in before.keys() - after.keys()}
    assert "commits/000001.json" in gone
    del before[store / ".lock"], after[store / ".lock"]  # it names the run while it works
    assert after.items() <= before.items()


@pytest.mark.parametrize(
    "spoil",
    [
        lambda store: next(store.glob("index.*")).write_bytes(b"ARROW1\0\0 what?"),
        lambda store: next(store.glob("index.*")).unlink(),
        lambda store: (store / "README.md").unlink(),
        lambda store: (store / "dataset.json").unlink(),
    ],
    ids=["damaged index", "no index", "no card", "no dataset.json"],
)
def test_a_run_writes_again_what_belongs_to_the_seal(
    songs: Path, tmp_path: Path, spoil: Callable[[Path], object]
) -> None:
    store = tmp_path / "store"
    encode(songs, store)
    files = {path: path.read_bytes() for path in store.iterdir() if path.is_file()}
    spoil(store)
    encode(songs, store)
    assert {path: path.read_bytes() for path in store.iterdir() if path.is_file()} == files
    runs.assert_whole(store)


@pytest.mark.parametrize("name", FORMATS)
def test_readers_have_the_sealed_bytes_while_a_unit_is_encoded_again(
    songs: Path, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = tmp_path / "store"
    encode(songs, store, format=name)
    opened = open_store(str(store))
    dataset = LatentDataset(str(store), crop=8, mode="start")
    early = LatentDataset(str(store), crop=8, mode="start")
    early_views = LatentDataset(str(store))
    old = {record.key: record.latent for record in open_store(str(store))}
    change(songs, 1, 0.5)
    sizes = {path.stat().st_size for path in (store / "shards").iterdir()}

    def still_old() -> None:
        for reader in (opened, open_store(str(store))):
            for key, latent in old.items():
                np.testing.assert_array_equal(reader.crop(key, 1, 4), latent[:, 1:5])
                np.testing.assert_array_equal(reader[key].latent, latent)
        crops = {dataset[n].key: dataset[n].latents for n in range(3)}
        for key, latent in old.items():
            np.testing.assert_array_equal(crops[key], latent[:, :8].astype(np.float32))

    stages: list[str] = []
    write_commit, seal = worker_module.write_commit, run_module.seal

    def between(*args: object, **options: object) -> object:
        stages.append("shard")
        still_old()
        written = write_commit(*args, **options)
        stages.append("commit")
        still_old()
        return written

    def before_seal(*args: object, **options: object) -> object:
        still_old()
        stages.append("seal")
        return seal(*args, **options)

    monkeypatch.setattr(worker_module, "write_commit", between)
    monkeypatch.setattr(run_module, "seal", before_seal)
    encode(songs, store, format=name, extend=True, retry_changed=True)
    assert stages == ["shard", "commit", "seal"]
    if name == "webdataset":  # a size would not tell the two apart
        assert {path.stat().st_size for path in (store / "shards").iterdir()} == sizes
    for key, latent in old.items():  # those that were opened before still have what they had
        np.testing.assert_array_equal(opened[key].latent, latent)
    new = open_store(str(store))
    assert unit_of(new, "1").startswith("000001.r1.")
    np.testing.assert_allclose(new["1"].latent, 2 * old["1"], atol=1e-2)
    runs.assert_whole(store)

    encode(songs, store, format=name)  # the next run removes what was superseded
    assert len(list((store / "shards").iterdir())) == 3
    fresh = LatentStore(str(store))
    for key in old:  # and a reader of the old seal finds the new one
        np.testing.assert_array_equal(opened[key].latent, fresh[key].latent)
    for late in (early, early_views):  # these had opened no shard yet
        for number, key in enumerate(sorted(old)):
            sample = late[number]
            assert sample.key == key
            frames = sample.latents.shape[1]
            expected = fresh[key].latent[:, :frames].astype(np.float32)
            np.testing.assert_array_equal(sample.latents, expected)
    runs.assert_whole(store)


@pytest.mark.parametrize("name", FORMATS)
def test_an_attempt_that_was_not_committed_is_in_nobodys_way(
    songs: Path, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed between shard and commit, with a shard of the size of the one that counts."""
    store = tmp_path / "store"
    encode(songs, store, format=name)
    old = open_store(str(store))["1"].latent
    change(songs, 1, 0.5)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(worker_module, "write_commit", killed)
        encode(songs, store, format=name, extend=True, retry_changed=True)
    np.testing.assert_array_equal(open_store(str(store))["1"].latent, old)
    assert encode(songs, store, format=name).info.encoded == 3
    new = open_store(str(store))
    np.testing.assert_allclose(new["1"].latent, 2 * old, atol=1e-2)
    runs.assert_whole(store)
    encode(songs, store, format=name)
    assert len(list((store / "shards").iterdir())) == 3


@pytest.mark.parametrize("name", FORMATS)
def test_the_shard_of_a_commit_that_was_deleted_keeps_its_name(
    songs: Path, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The advice for a damaged commit is to delete it. The seal still names its shard."""
    store = tmp_path / "store"
    encode(songs, store, format=name)
    opened = open_store(str(store))
    old = opened["1"].latent
    (store / "commits/000001.json").unlink()
    change(songs, 1, 0.5)
    seal = run_module.seal

    def before_seal(*args: object, **options: object) -> object:
        np.testing.assert_array_equal(opened["1"].latent, old)
        np.testing.assert_array_equal(opened.crop("1", 1, 4), old[:, 1:5])
        return seal(*args, **options)

    monkeypatch.setattr(run_module, "seal", before_seal)
    encode(songs, store, format=name, retry_failed=True)
    for reader in (opened, open_store(str(store))):
        np.testing.assert_allclose(reader["1"].latent, 2 * old, atol=1e-2)
        assert unit_of(reader, "1").startswith("000001.r1.")
    runs.assert_whole(store)


def test_a_missing_shard_is_reported_when_there_is_no_other_seal(
    songs: Path, tmp_path: Path
) -> None:
    encode(songs, tmp_path / "store")
    store = open_store(str(tmp_path / "store"))
    (tmp_path / "store" / store.entry("1").shard).unlink()
    with pytest.raises(StorageError, match="No such file"):
        store["1"]
    assert encode(songs, tmp_path / "store").info.revisions == {"000001": 1}
    assert store["1"].key == "1"
    runs.assert_whole(tmp_path / "store")


@pytest.mark.parametrize("name", FORMATS)
def test_plain_tools_see_each_record_once(
    songs: Path, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The card lists the shards that count; superseded ones lie beside them."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_OFFLINE", True)
    store = tmp_path / "store"
    encode(songs, store, format=name)
    change(songs, 1, 0.5)
    encode(songs, store, format=name, extend=True, retry_changed=True)
    assert len(list((store / "shards").iterdir())) == 4
    rows = datasets.load_dataset(str(store), split="train", cache_dir=str(tmp_path / "cache"))
    key = "key" if name == "parquet" else "__key__"
    assert sorted(row[key] for row in rows) == ["0", "1", "2"]
    if name == "parquet":
        latent = next(row["latent"] for row in rows if row["key"] == "1")
        assert latent == open_store(str(store))["1"].latent.T.tobytes()


def test_a_readme_of_the_users_own_stays(songs: Path, tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    (tmp_path / "store/README.md").write_text("mine")
    encode(songs, tmp_path / "store")
    assert (tmp_path / "store/README.md").read_text() == "mine"
