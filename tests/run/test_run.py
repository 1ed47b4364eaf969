"""Whole runs: resume, refusal, the same latents whatever the workers.

Tests that ask for `ray_session` run on Ray's actors. For the others, which are about what a run
does before and after, a worker in this process encodes the units: it starts 4 s sooner.
"""

from __future__ import annotations

import contextlib
import re
import shutil
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from latentmill import config
from latentmill.config import load_config
from latentmill.engine import lock
from latentmill.errors import (
    ITEMS_FAILED_EXIT_CODE,
    ConfigError,
    ModelError,
    SourceError,
    StoreError,
    UnitsFailedError,
)
from latentmill.plan import load, read_items
from latentmill.run.run import RunSummary, run
from latentmill.storage.storage import Storage
from latentmill.store.store import open_store
from support import runs
from support.in_process import in_process


def encode(source: Path, store: Path, **options: Any) -> RunSummary:
    defaults = {"device": "cpu", "unit_seconds": 3.0, "threads": 1, "workers": 1}
    return run(load_config(None, {"source": str(source), "out": str(store), **defaults, **options}))


@pytest.fixture(scope="module")
def songs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.write_songs(tmp_path_factory.mktemp("songs"), 9)


@pytest.fixture(scope="module")
def reference(songs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store that a worker in this process has made; leave it unchanged."""
    store = tmp_path_factory.mktemp("reference") / "store"
    with in_process():
        summary = encode(songs, store)
    assert (summary.info.encoded, summary.exit_code) == (9, 0)
    assert summary.units > 2
    runs.assert_whole(store)
    return store


@pytest.fixture
def copy(reference: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(reference, tmp_path / "store"))


@pytest.mark.usefixtures("ray_session")
def test_latents_do_not_depend_on_the_workers(songs: Path, reference: Path, tmp_path: Path) -> None:
    encode(songs, tmp_path / "two", workers=2)
    assert runs.latents(tmp_path / "two") == runs.latents(reference)
    shards = {path.name: path.read_bytes() for path in (reference / "shards").iterdir()}
    for name, content in shards.items():
        assert (tmp_path / "two" / "shards" / name).read_bytes() == content


@pytest.mark.parametrize("workers", [None, pytest.param(2, marks=pytest.mark.slow)])
def test_latents_of_lin_cae_do_not_depend_on_workers_or_restarts(
    songs: Path, tmp_path: Path, request: pytest.FixtureRequest, workers: int | None
) -> None:
    """In this process, or with two workers."""
    pytest.importorskip("linear_cae")
    from support.linear_cae_weights import use_cache, write_cache

    home = request.getfixturevalue("ray_session") if workers else tmp_path / "hf_home"
    write_cache(home)
    use_cache(request.getfixturevalue("monkeypatch"), home)
    options = {"model": "lin-cae", "dtype": "float32", "unit_seconds": 4.5}
    with in_process():
        encode(songs, tmp_path / "one", **options)
    one = runs.latents(tmp_path / "one")
    assert len(one) == 9
    two = Path(shutil.copytree(tmp_path / "one", tmp_path / "two"))
    for unit in ("000000", "000002"):
        (two / "commits" / f"{unit}.json").unlink()
        (two / "shards" / f"{unit}.parquet").unlink()
    with contextlib.nullcontext() if workers else in_process():
        assert encode(songs, two, workers=workers, **options).encoded_seconds > 4
    assert runs.latents(two) == one


def test_a_second_run_encodes_nothing(songs: Path, copy: Path, reference: Path) -> None:
    def written() -> dict[Path, int]:  # the lock names the run while it works
        files = (path for path in copy.rglob("*") if path.is_file() and path.name != ".lock")
        return {path: path.stat().st_mtime_ns for path in files}

    before = written()
    summary = encode(songs, copy)
    assert summary.resumed_units == summary.units
    assert summary.encoded_seconds == 0
    assert written() == before


@pytest.mark.usefixtures("inline")
def test_a_restart_encodes_what_is_missing_and_no_more(
    songs: Path, copy: Path, reference: Path
) -> None:
    (copy / "commits" / "000001.json").unlink()  # killed before the commit
    (copy / "shards" / "000002.parquet").unlink()  # lost afterwards
    (copy / "dataset.json").unlink()
    kept = runs.commits(copy)
    del kept["000002.json"]
    summary = encode(songs, copy)
    assert summary.units - summary.resumed_units == 2
    runs.assert_whole(copy)
    assert runs.latents(copy) == runs.latents(reference)
    assert kept.items() <= runs.commits(copy).items()


@pytest.mark.parametrize(
    ("options", "difference"),
    [
        ({"model_options": {"hop": 256}}, r"--model-option hop changed: .* 512, .* 256\."),
        ({"channels": "split"}, r"--channels changed: .* mono, .* split\."),
        ({"chunk_seconds": 2.0}, r"--chunk-seconds changed: .* [\d.]+ s, .* 2 s\."),
        ({"dtype": "float32"}, r"--dtype changed: .* float16, .* float32\."),
        ({"format": "webdataset"}, r"--format changed: .* parquet, .* webdataset\."),
    ],
)
def test_another_fingerprint_is_refused_by_name(
    songs: Path, copy: Path, options: dict[str, Any], difference: str
) -> None:
    (copy / "commits" / "000001.json").unlink()
    before = {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()}
    with pytest.raises(StoreError) as error:
        encode(songs, copy, **options)
    assert re.match(difference, str(error.value))
    assert error.value.exit_code == 5
    assert {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    ("version", "advice"),
    [(1, "you can still read it.*encode into a new output folder"), (99, "update latentmill")],
)
@pytest.mark.parametrize("extend", [False, True])
def test_a_store_of_another_encoding_version_is_only_read(
    songs: Path, tmp_path: Path, monkeypatch, inline: None, version: int, advice: str, extend: bool
) -> None:
    store = tmp_path / "store"
    with monkeypatch.context() as patch:
        patch.setattr(config, "ENCODING_VERSION", version)
        encode(songs, store)
    before = {path: path.read_bytes() for path in store.rglob("*") if path.is_file()}
    with pytest.raises(StoreError, match=f"encoding version {version}, now 2.*") as error:
        encode(songs, store, extend=extend)
    assert re.search(advice, str(error.value))
    assert (str(error.value).count(". "), error.value.exit_code) == (0, 5)
    assert {path: path.read_bytes() for path in store.rglob("*") if path.is_file()} == before
    runs.assert_whole(store)


def test_another_source_is_refused(songs: Path, copy: Path, tmp_path: Path) -> None:
    other = shutil.copytree(songs, tmp_path / "other")
    with pytest.raises(StoreError, match=r"^SOURCE changed: .*songs.*, .*other\."):
        encode(other, copy)


def test_a_store_put_together_from_two_is_refused(songs: Path, copy: Path) -> None:
    commit = copy / "commits" / "000001.json"
    fingerprint = open_store(str(copy)).info.fingerprint
    commit.write_text(commit.read_text().replace(fingerprint, "0" * 32))
    with pytest.raises(StoreError, match=r"000001 .* come from two stores"):
        encode(songs, copy)


@pytest.mark.usefixtures("inline")
def test_a_mono_model_takes_stereo_channel_by_channel(tmp_path: Path) -> None:
    stereo = np.random.default_rng(0).uniform(-0.5, 0.5, (50_001, 2)).astype(np.float32)
    (tmp_path / "in").mkdir()
    soundfile.write(tmp_path / "in" / "stereo.wav", stereo, 44100, subtype="FLOAT")
    soundfile.write(tmp_path / "in" / "mono.wav", stereo[:, 0], 44100, subtype="FLOAT")
    options: dict[str, Any] = {"dtype": "float32", "channels": "split"}
    encode(tmp_path / "in", tmp_path / "out", **options)
    store = open_store(str(tmp_path / "out"))
    assert store.plan.channels == store.info.model["asked_channels"] == "split"
    assert (store.info.model["channels"], store.info.model["latent_channels"]) == (2, 1024)
    assert np.abs(store.decode("stereo") - stereo.T).max() < 1e-5
    left, right = np.split(store["mono"].latent, 2)
    assert np.array_equal(left, right)
    assert store.decode("mono").shape == (2, 50_001)
    assert encode(tmp_path / "in", tmp_path / "out", **options).encoded_seconds == 0
    with pytest.raises(StoreError, match=r"^--channels changed: .* split, .* mono\."):
        encode(tmp_path / "in", tmp_path / "out", dtype="float32")


@pytest.mark.usefixtures("inline")
def test_a_source_that_is_gone_fails_no_items(songs: Path, copy: Path, tmp_path: Path) -> None:
    moved = Path(shutil.copytree(songs, tmp_path / "moved"))
    store = tmp_path / "new"
    encode(moved, store)
    moved.rename(tmp_path / "unmounted")
    for number, missing in enumerate(("1 unit", "2 units")):
        (store / "commits" / f"{number:06d}.json").unlink()
        message = rf"does not exist, but {missing} of \S+ must still be encoded: mount"
        with pytest.raises(SourceError, match=message):
            encode(moved, store)
    (tmp_path / "unmounted").rename(moved)
    assert encode(moved, store).info.encoded == 9


@pytest.mark.usefixtures("inline")
def test_a_source_that_was_renamed_is_found_through_a_link(
    songs: Path, reference: Path, tmp_path: Path
) -> None:
    """As the error advises."""
    before = Path(shutil.copytree(songs, tmp_path / "before"))
    store = tmp_path / "new"
    encode(before, store)
    before.rename(tmp_path / "after")
    (store / "commits" / "000000.json").unlink()
    with pytest.raises(SourceError, match="or make a link to it at this path if it was moved"):
        encode(before, store)
    before.symlink_to(tmp_path / "after")
    summary = encode(before, store)
    assert (summary.info.encoded, summary.units - summary.resumed_units) == (9, 1)
    assert runs.latents(store) == runs.latents(reference)
    found = encode(before, store, extend=True).extension
    assert found is not None
    assert (found.new, found.changed, found.vanished) == (0, 0, 0)


@pytest.mark.usefixtures("ray_session")
def test_a_run_that_encodes_a_unit_again_keeps_the_latents_of_missing_files(
    songs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Loading in the worker's threads, and in tasks of Ray."""
    moved = Path(shutil.copytree(songs, tmp_path / "moved"))
    with in_process():
        encode(moved, tmp_path / "store")
    before = runs.latents(tmp_path / "store")
    gone, changed = sorted(moved.rglob("*.wav"))[:2]
    gone.unlink()
    audio, rate = soundfile.read(changed)
    soundfile.write(changed, audio[:-500], rate, subtype="FLOAT")
    keys = [path.relative_to(moved).with_suffix("").as_posix() for path in (gone, changed)]
    for tasks in (0, 2):
        store = Path(shutil.copytree(tmp_path / "store", tmp_path / f"store {tasks}"))
        options = {"extend": True, "retry_changed": True, "load_tasks": tasks}
        with contextlib.nullcontext() if tasks else in_process():
            done = encode(moved, store, **options)
        assert (done.exit_code, done.units - done.resumed_units) == (0, 1)
        assert [key for key, _ in done.kept] == keys[:1]
        after = runs.latents(store)
        assert after.pop(keys[1]) != before[keys[1]]
        assert after == {key: latent for key, latent in before.items() if key != keys[1]}
        runs.assert_whole(store)
        assert runs.call(capsys, "verify", store).code == 0


@pytest.mark.usefixtures("inline")
def test_a_folder_without_its_mount_fails_no_items(songs: Path, copy: Path, tmp_path: Path) -> None:
    moved = Path(shutil.copytree(songs, tmp_path / "moved"))
    store = tmp_path / "new"
    encode(moved, store)
    (store / "commits" / "000001.json").unlink()
    before = runs.commits(store)
    moved.rename(tmp_path / "unmounted")
    moved.mkdir()
    message = r"has none of the planned files .* but 1 unit of \S+ must still be encoded: mount"
    for _ in range(2):
        with pytest.raises(SourceError, match=message):
            encode(moved, store)
        assert runs.commits(store) == before
    (moved / "lost+found").mkdir()
    with pytest.raises(SourceError, match=message):
        encode(moved, store)
    shutil.rmtree(moved)
    (tmp_path / "unmounted").rename(moved)
    storage = Storage(str(store))
    plan = load(storage)
    assert plan is not None
    for item in read_items(storage, plan.units[1]):
        Path(item.uri).unlink()  # if only files of the units that are left are gone, they fail
    assert encode(moved, store).exit_code == ITEMS_FAILED_EXIT_CODE


@pytest.mark.usefixtures("inline")
def test_files_that_are_added_later_do_not_move_the_plan(tmp_path: Path) -> None:
    songs = runs.write_songs(tmp_path / "songs", 4)
    store = tmp_path / "store"
    encode(songs, store)
    (store / "commits" / "000000.json").unlink()
    before = runs.latents(store)
    runs.write_songs(songs, 2, first=10)
    assert encode(songs, store).info.items == 4
    assert before.items() <= runs.latents(store).items()


def test_two_runs_do_not_share_a_store(
    songs: Path, copy: Path, inline: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock, "WAIT_SECONDS", 0.3)
    (copy / "commits" / "000001.json").unlink()
    storage = Storage(str(copy))
    with lock.only_run(storage):
        worker = lock.Membership(storage)
        with pytest.raises(StoreError, match="Another run is writing to"):
            encode(songs, copy)
    with pytest.raises(StoreError, match="Another run is writing to"):  # its worker lives on
        encode(songs, copy)
    threading.Timer(0.1, worker.close).start()
    encode(songs, copy)
    runs.assert_whole(copy)


def test_what_looks_like_a_users_folder_is_left_alone(songs: Path, tmp_path: Path) -> None:
    mine = tmp_path / "home" / "tmp" / "thesis.tex"
    mine.parent.mkdir(parents=True)
    mine.write_text("precious")
    with pytest.raises(StoreError, match="has files that latentmill did not write"):
        encode(songs, tmp_path / "home")
    shards = tmp_path / "other" / "shards" / "000000.parquet"
    shards.parent.mkdir(parents=True)
    shards.write_text("precious")
    with pytest.raises(StoreError, match="has shards/ but no plan"):
        encode(songs, tmp_path / "other")
    assert mine.read_text() == shards.read_text() == "precious"


@pytest.mark.usefixtures("inline")
def test_a_run_killed_while_it_froze_its_plan_starts_anew(songs: Path, tmp_path: Path) -> None:
    scratch = tmp_path / "store" / "tmp"
    scratch.mkdir(parents=True)
    (scratch / f"{'0f' * 16}.plan.items.parquet").write_bytes(b"PAR1")
    encode(songs, tmp_path / "store")
    runs.assert_whole(tmp_path / "store")


@pytest.mark.parametrize(
    "raising", [pytest.param(False, marks=pytest.mark.slow), True], ids=["dies", "raises"]
)
@pytest.mark.usefixtures("ray_session")
def test_a_deadly_unit_takes_no_other_with_it(tmp_path: Path, raising: bool) -> None:
    songs = runs.write_songs(tmp_path / "songs", 1, peak=0.9, first=3)
    runs.write_songs(songs, 6)
    store, log = tmp_path / "store", tmp_path / "log"
    options = {"model": runs.SLOW_MODEL, "unit_seconds": 2.5}  # two songs
    options["model_options"] = {"deadly_peak": 0.8, "raising": raising, "log": str(log)}
    with pytest.raises(UnitsFailedError) as error:
        encode(songs, store, **options)
    assert error.value.exit_code == 9
    assert "1 of 3 units failed on 3 attempts each" in str(error.value)
    assert ("does not like this" in str(error.value)) == raising
    assert len(runs.commits(store)) == 2
    assert not (store / "dataset.json").exists()
    assert not (store / "tmp").exists()

    kept = runs.commits(store)
    log.unlink()
    options["model_options"] = {"deadly_peak": 2.0, "log": str(log)}  # it was repaired
    with in_process():
        assert encode(songs, store, **options).info.encoded == 6
    runs.assert_whole(store)
    assert kept.items() <= runs.commits(store).items()
    assert len(log.read_text().splitlines()) == 2  # the songs of the one unit


@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
def test_a_worker_that_dies_while_loading_is_said_at_once(songs: Path, tmp_path: Path) -> None:
    with pytest.raises(UnitsFailedError, match="died while it loaded the model"):
        encode(
            songs,
            tmp_path / "store",
            model=runs.SLOW_MODEL,
            model_options={"deadly_load": True},
        )


def test_a_gpu_that_is_not_there_is_an_error(songs: Path, tmp_path: Path) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(ConfigError, match="--device cuda is not available"):
        encode(songs, tmp_path / "store", device="cuda")
    assert not (tmp_path / "store").exists()


@pytest.mark.usefixtures("inline")
def test_failed_and_skipped_items_are_accounted_for(tmp_path: Path) -> None:
    songs = runs.write_songs(tmp_path / "songs", 3)
    runs.write_songs(songs, 1, seconds=0.2, first=7)
    (songs / "broken.wav").write_bytes(b"RIFF")
    (songs / "text.mp3").write_text("no audio")
    summary = encode(songs, tmp_path / "store", min_seconds=0.5)
    assert (summary.info.encoded, summary.info.skipped, summary.info.failed) == (3, 1, 2)
    assert summary.exit_code == 3
    assert {key for key, _ in summary.failures} == {"broken", "text"}
    assert [key for key, _ in summary.skipped] == ["album 1/song 07"]
    assert encode(songs, tmp_path / "store", min_seconds=0.5).exit_code == 3
    runs.assert_whole(tmp_path / "store")


def test_unknown_models_and_options(songs: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="did you mean mdct"):
        encode(songs, tmp_path / "store", model="mdtc")
    with pytest.raises(ConfigError, match="unknown setting colour"):
        encode(songs, tmp_path / "store", colour="blue")
    assert not (tmp_path / "store").exists()
