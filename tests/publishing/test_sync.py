"""Copies of stores between storages: complete, updated, refused, and resumed after any fault."""

from __future__ import annotations

import contextlib
import json
import random
import shutil
import tempfile
import tracemalloc
import uuid
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import fsspec
import numpy as np
import pytest
import xxhash

import latentmill as lm
from latentmill.engine import lease
from latentmill.engine.lock import only_run
from latentmill.errors import ConfigError, LatentmillError, StorageError, StoreError
from latentmill.evaluation.statistics import measure_statistics
from latentmill.plan import load
from latentmill.publishing.contents import contents_of
from latentmill.publishing.sync import sync
from latentmill.publishing.transfer import BLOCK
from latentmill.storage.storage import Storage
from latentmill.store.annotations import annotation_path
from latentmill.store.measurement import write_measurement
from latentmill.store.results import SeamEntry
from latentmill.store.schema import DATASET_PATH
from latentmill.store.seal import seal
from latentmill.store.tidy import tidy
from latentmill.store.verify import verify
from support.latent_store import latent_of, write_again, write_latents
from support.operation_faults import WRITE_MODES, Faults, Killed, faults_on

LENGTHS = [5, 9, 17, 30, 12, 7, 21]
OneSentence = Callable[[BaseException], str]


def files(url: str) -> dict[str, bytes]:
    """Every file of a folder or bucket, but the lock."""
    fs, root = fsspec.core.url_to_fs(url)
    fs.invalidate_cache()
    found = {path.removeprefix(root).lstrip("/"): fs.cat_file(path) for path in fs.find(root)}
    return {name: data for name, data in found.items() if name not in (".lock", ".lease")}


def store_at(url: str, **options: object) -> str:
    """A store of three units, with a result of an evaluation and an annotation."""
    store = write_latents(url, LENGTHS, per_unit=3, **options)  # type: ignore[arg-type]
    write_measurement(store.storage, store.info, SeamEntry(items=1, median=0.1, largest=0.2))
    annotated(store.url, "mood", "calm")
    return store.url


def annotated(url: str, name: str, value: str) -> None:
    """Annotate the first record."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "a.csv")
        file.write_text(f"key,{name}\nitem/00000,{value}\n")
        lm.annotate(url, str(file))
    tidy(Storage(url))


@pytest.fixture(autouse=True)
def _short_leases(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "Timing", partial(lease.Timing, settle=0.0, poll=0.01))


@pytest.fixture
def places(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Callable[[str], str]]:
    """Makes new URLs on a kind of storage."""
    memory = uuid.uuid4().hex

    def make(kind: str) -> str:
        name = uuid.uuid4().hex[:8]
        if kind == "s3":
            return f"{request.getfixturevalue('s3_bucket')}/{name}"
        return f"memory://{memory}/{name}" if kind == "memory" else str(tmp_path / name)

    yield make
    fs = fsspec.filesystem("memory")
    if fs.exists(memory):
        fs.rm(memory, recursive=True)


@pytest.mark.parametrize(
    ("source", "dest", "format_name"),
    [
        ("disk", "disk", "parquet"),
        ("disk", "s3", "webdataset"),
        pytest.param("s3", "disk", "parquet", marks=pytest.mark.slow),
        ("memory", "memory", "webdataset"),
        ("s3", "memory", "parquet"),
    ],
)
def test_a_copy_has_the_bytes_of_its_store(
    source: str, dest: str, format_name: str, places: Callable[[str], str]
) -> None:
    url, copy = store_at(places(source), format_name=format_name), places(dest)
    before = files(url)
    result = sync(url, copy)
    assert files(copy) == files(url) == before
    assert set(result.copied) == set(before)
    assert result.copied[-1] == "dataset.json"
    assert (result.bytes, result.kept) == (sum(map(len, before.values())), 0)
    assert verify(lm.open(copy)).faults == []
    again = sync(url, copy)
    assert (again.copied, again.kept, again.removed) == ((), len(before), ())


def test_leftovers_are_not_copied(tmp_path: Path) -> None:
    url, copy = store_at(str(tmp_path / "store")), str(tmp_path / "copy")
    clean = files(url)
    for name in ("shards/000001.r1.parquet", "tmp/x.000000", "index.0f.arrow", ".lock", "mine.txt"):
        Storage(url).write(name, b"left")
    Storage(url).write("plan/items-0007.parquet", b"left")
    sync(url, copy)
    assert files(copy) == clean


def test_an_earlier_copy_is_updated(places: Callable[[str], str]) -> None:
    for kind in ("disk", "memory"):
        url, copy = store_at(places("disk")), places(kind)
        sync(url, copy)
        reader = lm.open(copy)
        first = reader["item/00000"].latent.copy()
        latents = [latent_of(number + 1, length) for number, length in enumerate(LENGTHS)]
        write_again(url, [1], latents)
        planned = sync(url, copy, dry_run=True)
        assert "shards/000001.r1.parquet" in planned.copied
        assert "shards/000001.parquet" in planned.removed
        result = sync(url, copy)
        assert (result.copied, result.removed) == (planned.copied, planned.removed)
        assert not [path for path in result.copied if "000000" in path or "000002" in path]
        assert files(copy) == files(url)
        assert verify(lm.open(copy)).faults == []
        np.testing.assert_array_equal(reader["item/00004"].latent, latents[4])
        np.testing.assert_array_equal(reader["item/00000"].latent, first)


def test_results_and_annotations_follow(tmp_path: Path) -> None:
    url, copy = store_at(str(tmp_path / "store")), str(tmp_path / "copy")
    sync(url, copy)
    store = lm.open(url)
    write_measurement(store.storage, store.info, SeamEntry(items=1, median=0.3, largest=0.4))
    annotated(url, "mood", "wild")
    result = sync(url, copy)
    assert set(result.copied) == {
        "annotations/0002.parquet",
        "evaluation/seams.json",
        lm.open(url).info.metadata,
        "dataset.json",
    }
    assert lm.open(copy)["item/00000"].metadata["mood"] == "wild"
    assert files(copy) == files(url)


def test_earlier_annotations_that_were_deleted(tmp_path: Path, one_sentence: OneSentence) -> None:
    """The copy keeps its files of them, unless they are not those of the store."""
    url, copy = store_at(str(tmp_path / "store")), tmp_path / "copy"
    sync(url, str(copy))
    annotated(url, "mood", "wild")
    (tmp_path / "store" / annotation_path(1)).unlink()
    sync(url, str(copy))
    assert lm.open(str(copy))["item/00000"].metadata["mood"] == "wild"
    assert verify(lm.open(str(copy))).faults == []
    (copy / annotation_path(1)).write_bytes((copy / annotation_path(2)).read_bytes())
    with pytest.raises(ConfigError, match=r"is damaged \(annotations/0001") as caught:
        sync(url, str(copy))
    one_sentence(caught.value)


def test_earlier_annotations_that_nobody_knows(tmp_path: Path) -> None:
    """A seal that replaces a lost one has no hashes of deleted files."""
    url, copy = store_at(str(tmp_path / "store")), str(tmp_path / "copy")
    sync(url, copy)
    annotated(url, "mood", "wild")
    for name in (annotation_path(1), DATASET_PATH):
        (tmp_path / "store" / name).unlink()
    plan = load(Storage(url))
    assert plan is not None
    seal(Storage(url), plan)
    with pytest.raises(ConfigError, match=r"is damaged \(annotations/0001"):
        sync(url, copy)


@pytest.mark.parametrize("kind", ["disk", "memory"])
def test_vectors_of_the_statistics(
    kind: str, places: Callable[[str], str], one_sentence: OneSentence
) -> None:
    """Earlier vectors are removed from a copy, unless it has statistics of its own."""
    url, copy = store_at(places("disk")), places(kind)
    sync(url, copy)
    measure_statistics(lm.open(copy))
    (own,) = (name for name in files(copy) if "vectors" in name)
    assert sync(url, copy).removed == ()
    assert own in files(copy)
    latents = [latent_of(number + 1, length) for number, length in enumerate(LENGTHS)]
    measure_statistics(write_again(url, [0, 1, 2], latents))
    result = sync(url, copy)
    assert own in result.removed
    assert files(copy) == files(url)
    (name,) = (name for name in files(url) if "vectors" in name)
    assert result.copied.index(name) < result.copied.index("evaluation/statistics.json")
    assert lm.neighbours(copy, "item/00000") == lm.neighbours(url, "item/00000")
    Path(url, name).write_bytes(b"x")
    with pytest.raises(
        StoreError, match=r"vectors.* is damaged: run `latentmill evaluate"
    ) as error:
        sync(url, copy)
    one_sentence(error.value)


def test_a_copy_of_a_view(tmp_path: Path) -> None:
    """As the error for a view says."""
    url, _ = view(tmp_path)
    lm.select(url, tmp_path / "own", copy=True)
    sync(tmp_path / "own", tmp_path / "d")
    assert [record.key for record in lm.open(tmp_path / "d")] == list(lm.open(url).keys())
    assert verify(lm.open(tmp_path / "d")).faults == []


def test_a_card_that_was_written_by_hand_stays(tmp_path: Path) -> None:
    url, copy = store_at(str(tmp_path / "store")), str(tmp_path / "copy")
    sync(url, copy)
    Path(copy, "README.md").write_text("mine")
    assert sync(url, copy).copied == ()
    Path(url, "README.md").write_text("of the store")
    assert sync(url, copy).copied == ("README.md",)
    assert Path(copy, "README.md").read_text() == "of the store"


@pytest.mark.parametrize(
    "name", ["shards/000001.parquet", "shards/000001.parquet cut", "index", "commits", "plan"]
)
def test_a_damaged_store_is_not_copied(
    name: str, tmp_path: Path, one_sentence: OneSentence
) -> None:
    url, copy = store_at(str(tmp_path / "store")), str(tmp_path / "copy")
    path, _, cut = name.partition(" ")
    given = {
        "index": lm.open(url).info.index,
        "commits": "commits/000001.json",
        "plan": "plan/items.parquet",
    }
    path = given.get(path, path)
    file = Path(url, path)
    data = bytearray(file.read_bytes())
    if path.endswith("json"):
        data = bytearray(data.replace(b'"audio_seconds":', b'"audio_seconds":1'))
    elif cut:
        del data[-1:]
    else:
        data[len(data) // 2] ^= 1
    file.write_bytes(data)
    with pytest.raises(StoreError) as caught:
        sync(url, copy)
    assert "damaged" in one_sentence(caught.value)
    there = files(copy) if Path(copy).exists() else {}
    assert path not in there
    assert "dataset.json" not in there
    assert all(there[name] == data for name, data in files(url).items() if name in there)


def test_a_missing_shard(tmp_path: Path, one_sentence: OneSentence) -> None:
    url = store_at(str(tmp_path / "store"))
    Path(url, "shards/000001.parquet").unlink()
    with pytest.raises(StorageError, match=r"shards/000001\.parquet") as caught:
        sync(url, str(tmp_path / "copy"))
    one_sentence(caught.value)


def incomplete(tmp_path: Path) -> tuple[str, str]:
    return write_latents(str(tmp_path / "s"), LENGTHS, sealed=False).url, str(tmp_path / "d")


def no_store(tmp_path: Path) -> tuple[str, str]:
    return str(tmp_path / "s"), str(tmp_path / "d")


def view(tmp_path: Path) -> tuple[str, str]:
    lm.select(store_at(str(tmp_path / "s")), tmp_path / "view", where="number > 2")
    return str(tmp_path / "view"), str(tmp_path / "d")


def unexpected_name(tmp_path: Path) -> tuple[str, str]:
    url = store_at(str(tmp_path / "s"))
    Path(url, "evaluation/a b\n").write_text("x")
    return url, str(tmp_path / "d")


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (incomplete, "is not complete: run the same encode command again"),
        (no_store, "is not a latentmill store"),
        (view, "is a view, .*: make a store of it with `latentmill select"),
        (unexpected_name, "is not the name of a file in a store"),
    ],
)
def test_what_cannot_be_copied(
    make: Callable[[Path], tuple[str, str]], says: str, tmp_path: Path, one_sentence: OneSentence
) -> None:
    url, copy = make(tmp_path)
    with pytest.raises(StoreError, match=says) as caught:
        sync(url, copy)
    one_sentence(caught.value)
    assert not Path(copy).exists()


def not_empty(tmp_path: Path, url: str) -> str:
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "a.txt").write_text("a")
    return str(tmp_path / "d")


def own_tmp(tmp_path: Path, url: str) -> str:
    (tmp_path / "d" / "tmp" / "letters").mkdir(parents=True)
    (tmp_path / "d" / "tmp" / "letters" / "a.txt").write_text("a")
    return str(tmp_path / "d")


def other_store(tmp_path: Path, url: str) -> str:
    return write_latents(str(tmp_path / "d"), LENGTHS, per_unit=2).url


def other_model(tmp_path: Path, url: str) -> str:
    return write_latents(str(tmp_path / "d"), LENGTHS, per_unit=3, model={"hop": 7}).url


def encoded_itself(tmp_path: Path, url: str) -> str:
    shutil.copytree(url, tmp_path / "d")
    commit = tmp_path / "d" / "commits" / "000002.json"
    commit.write_text(commit.read_text().replace('"worker":"', '"worker":"x'))
    (tmp_path / "d" / "dataset.json").unlink()
    return str(tmp_path / "d")


def encoded_again(tmp_path: Path, url: str) -> str:
    shutil.copytree(url, tmp_path / "d")
    write_again(str(tmp_path / "d"), [1], [latent_of(3, length) for length in LENGTHS])
    return str(tmp_path / "d")


def annotated_itself(tmp_path: Path, url: str) -> str:
    shutil.copytree(url, tmp_path / "d")
    annotated(str(tmp_path / "d"), "mood", "other")
    return str(tmp_path / "d")


def fewer_items(tmp_path: Path, url: str) -> str:
    return write_latents(str(tmp_path / "d"), LENGTHS[:-1], per_unit=3).url


DESTINATIONS: list[tuple[Callable[[Path, str], str], str]] = [
    (not_empty, "is not empty"),
    (own_tmp, "is not empty"),
    (other_store, "but another store"),
    (other_model, "but another store"),
    (fewer_items, "but another store"),
    (encoded_itself, r"has changes of its own or is damaged.*commits/000002\.json"),
    (encoded_again, r"has changes of its own or is damaged.*commits/000001\.r1\.json"),
    (annotated_itself, r"has changes of its own or is damaged.*annotations/0002\.parquet"),
    (lambda tmp_path, url: f"{url}/copy", "overlap"),
    (lambda tmp_path, url: str(tmp_path), "overlap"),
    (lambda tmp_path, url: url, "overlap"),
    (lambda tmp_path, url: "https://example.invalid/x", "read-only"),
    (lambda tmp_path, url: "hf://datasets/a/b", "use `latentmill push"),
]


@pytest.mark.parametrize(("make", "says"), DESTINATIONS)
def test_destinations_that_are_refused(
    make: Callable[[Path, str], str], says: str, tmp_path: Path, one_sentence: OneSentence
) -> None:
    url = store_at(str(tmp_path / "s"))
    dest = make(tmp_path, url)
    before = files(dest) if "://" not in dest else {}
    with pytest.raises(ConfigError, match=says) as caught:
        sync(url, dest)
    one_sentence(caught.value)
    assert "://" in dest or files(dest) == before


def test_a_destination_that_is_written_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_sentence: OneSentence
) -> None:
    monkeypatch.setattr("latentmill.engine.lock.WAIT_SECONDS", 0.1)
    url, copy = store_at(str(tmp_path / "s")), Storage(str(tmp_path / "d"))
    with only_run(copy), pytest.raises(StoreError, match="Another run is writing") as caught:
        sync(url, copy.root)
    one_sentence(caught.value)


def test_a_store_that_is_sealed_again_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_sentence: OneSentence
) -> None:
    url, copy = store_at(str(tmp_path / "s")), str(tmp_path / "d")

    def listed(source: str) -> object:
        found = contents_of(source)
        write_again(url, [1], [latent_of(3, length) for length in LENGTHS])
        return found

    with monkeypatch.context() as patch:
        patch.setattr("latentmill.publishing.sync.contents_of", listed)
        with pytest.raises(StoreError, match="was changed while it was read") as caught:
            sync(url, copy)
    one_sentence(caught.value)
    sync(url, copy)
    assert files(copy) == files(url)


def test_a_dry_run_writes_nothing(tmp_path: Path) -> None:
    url, copy = store_at(str(tmp_path / "s")), tmp_path / "d"
    result = sync(url, copy, dry_run=True)
    assert result.dry_run
    assert set(result.copied) == set(files(url))
    assert not copy.exists()


def test_a_damaged_copy_is_repaired(tmp_path: Path) -> None:
    url, copy = store_at(str(tmp_path / "s")), str(tmp_path / "d")
    sync(url, copy)
    Path(copy, "shards/000000.parquet").write_bytes(b"cut")
    Path(copy, "shards/000001.parquet").unlink()
    Path(copy, "origin.npy").write_bytes(b"x")
    assert sync(url, copy).copied == (
        "origin.npy",
        "shards/000000.parquet",
        "shards/000001.parquet",
    )
    assert files(copy) == files(url)


def test_files_of_the_system_in_a_copy_are_no_changes_of_its_own(tmp_path: Path) -> None:
    url, copy = store_at(str(tmp_path / "s")), tmp_path / "d"
    sync(url, str(copy))
    folders = [copy, *(path for path in copy.iterdir() if path.is_dir())]
    for folder in folders:
        (folder / ".DS_Store").write_bytes(b"x")
    assert sync(url, str(copy)).copied == ()
    annotated(url, "mood", "loud")
    assert "annotations/0002.parquet" in sync(url, str(copy)).copied
    assert all((folder / ".DS_Store").exists() for folder in folders)


@pytest.mark.parametrize("kind", ["shard", "vectors"])
def test_a_large_file_is_copied_in_pieces(kind: str, places: Callable[[str], str]) -> None:
    size = 3 * BLOCK
    latent = np.zeros((64, size // 128 if kind == "shard" else 1), np.float16)
    url = write_latents(places("disk"), [latent.shape[1]], channels=64, latents=[latent]).url
    if kind == "vectors":
        data = bytes(size)
        name = f"vectors.{xxhash.xxh3_128_hexdigest(data)[:16]}.npy"
        Storage(url).write(f"evaluation/{name}", data)
    tracemalloc.start()
    try:
        sync(url, places("disk"))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 2.5 * BLOCK


@pytest.mark.filterwarnings("ignore:.* is not complete")
@pytest.mark.parametrize("seed", range(4))
def test_interrupted_copies_of_a_store_that_changes(seed: int, tmp_path: Path) -> None:
    """Whatever happened, the last copy has the bytes of the store."""
    rng = random.Random(seed)
    url, copy = store_at(str(tmp_path / "s")), str(tmp_path / "d")
    for _ in range(6):
        if rng.random() < 0.4:
            number = rng.randrange(100)
            units = rng.sample(range(3), rng.randrange(1, 3))
            write_again(url, units, [latent_of(number, length) for length in LENGTHS])
        stopped = contextlib.suppress(Killed, KeyboardInterrupt, LatentmillError)
        with faults_on(Faults(rng.choice(WRITE_MODES), rng.randrange(60))), stopped:
            sync(url, copy, jobs=rng.choice((1, 3)))
        for commit in Path(copy).glob("commits/*.json"):
            written = json.loads(commit.read_text())
            assert Path(copy, written["shard"]).stat().st_size == written["bytes"]
        if Path(copy, "dataset.json").exists():
            sealed = lm.open(copy)
            assert len([record.latent for record in sealed]) == len(LENGTHS)
    sync(url, copy)
    assert files(copy) == files(url)
    assert verify(lm.open(copy)).faults == []


@pytest.mark.parametrize("copy", ["sync", "push", "pull"])
def test_no_jobs_are_an_error_before_anything_is_written(
    copy: str, places: Callable[[str], str], one_sentence: Callable[[BaseException], str]
) -> None:
    url, dest = store_at(places("disk")), places("disk")
    copies = {
        "sync": lambda: lm.sync(url, dest, jobs=0),
        "push": lambda: lm.push(url, "hf://datasets/me/songs", jobs=0),
        "pull": lambda: lm.pull("hf://datasets/me/songs", dest, jobs=0),
    }
    with pytest.raises(ConfigError, match="jobs must be at least 1, not 0") as caught:
        copies[copy]()
    one_sentence(caught.value)
    assert not Path(dest).exists()
