"""`ray job submit` for real, against a head with the Jobs API that asks for a token.

One submission runs always; the others take a minute or more and are marked slow.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray_head import ROOT, Head, started_head

from latentmill.store.store import open_store
from support import runs

pytest.importorskip("aiohttp_cors", reason="the Jobs API needs pip install 'ray[default]'")

ENCODE = ("python", "jobs/encode.py", "--config", "jobs/run.yaml")


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    with started_head() as one:
        yield one


@pytest.fixture(scope="module")
def songs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.write_songs(tmp_path_factory.mktemp("songs"), 4)


def working_dir(folder: Path, source: Path, *, carried: bool, **settings: Any) -> Path:
    """A clone to submit from (or, if it is not `carried`, a folder without the library)."""
    folder.mkdir()
    shutil.copytree(ROOT / "jobs", folder / "jobs")
    shutil.copytree(ROOT / "examples", folder / "examples")
    for name in (".gitignore", ".rayignore"):
        shutil.copy(ROOT / name, folder)
    shutil.copy(Path(__file__).with_name("traced_model.py"), folder)
    if carried:
        ignore = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / "pipeline", folder / "pipeline", ignore=ignore)
    log = str(folder.with_name("library.txt"))
    config = {
        "source": str(source),
        "out": str(folder.with_name("store")),
        "model": "python:traced_model:build",
        "model_options": {"log": log, **settings.pop("model_options", {})},
        "device": "cpu",
        "workers": 1,
        **settings,
    }
    (folder / "jobs" / "run.yaml").write_text(yaml.safe_dump(config))
    return folder


def library(folder: Path) -> Path:
    """Where the workers' latentmill was."""
    return Path(folder.with_name("library.txt").read_text())


@pytest.mark.slow
def test_the_documented_command_with_the_library_carried(
    head: Head, songs: Path, tmp_path: Path
) -> None:
    folder = working_dir(tmp_path / "clone", songs, carried=True)
    for name in (".venv/lib/big.py", "latents/shards/000000.parquet", "corpus/a.wav", "tests/t.py"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(bytes(1000))
    done = head.submit(folder, *ENCODE)
    assert done.code == 0, done.text
    assert "4 items; starting the workers" in done.text
    assert "4/4 items" in done.text  # the progress line, in the job's log
    assert "4 encoded, 0 skipped, 0 failed" in done.text
    assert (head.info(done.job)["status"], head.info(done.job)["driver_exit_code"]) == (
        "SUCCEEDED",
        "0",
    )
    runs.assert_whole(tmp_path / "store")
    unpacked = library(folder).parents[1]
    assert library(folder) == unpacked / "pipeline" / "latentmill"
    assert unpacked in head.unpacked()
    travelled = {path.name for path in unpacked.iterdir()}
    own = {"traced_model.py", ".gitignore", ".rayignore"}
    assert travelled <= own | {"examples", "jobs", "pipeline"}


@pytest.mark.slow
def test_the_diffusion_example_is_trained(head: Head, songs: Path, tmp_path: Path) -> None:
    folder = working_dir(tmp_path / "clone", songs, carried=True)
    small = ["--steps", "2", "--batch", "2", "--crop", "32", "--width", "32", "--depth", "1"]
    results = tmp_path / "dit"
    done = head.submit(folder, "python", "jobs/train_dit.py", "--folder", results, *small)
    assert done.code == 0, done.text
    assert (results / "dit.pt").exists()


@pytest.mark.slow
def test_the_library_installed_instead_of_carried(head: Head, songs: Path, tmp_path: Path) -> None:
    import latentmill

    folder = working_dir(tmp_path / "folder", songs, carried=False)
    done = head.submit(folder, *ENCODE)
    assert done.code == 0, done.text
    runs.assert_whole(tmp_path / "store")
    assert library(folder) == Path(latentmill.__file__).parent
    checked = head.submit(folder, "latentmill", "verify", tmp_path / "store")
    assert checked.code == 0, checked.text
    assert "4 records of 4 items: no faults" in checked.text


@pytest.mark.slow
def test_failed_items_fail_the_job_with_their_code(head: Head, songs: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(songs, tmp_path / "songs"))
    (source / "empty.wav").write_bytes(b"")
    folder = working_dir(tmp_path / "clone", source, carried=True)
    done = head.submit(folder, *ENCODE)
    info = head.info(done.job)
    assert done.code == 1  # what `ray job submit` makes of any failure
    assert (info["status"], info["driver_exit_code"]) == ("FAILED", "3")
    assert "exit code 3" in info["message"]
    assert "failed: empty: " in done.text
    runs.assert_whole(tmp_path / "store")
    missing = head.submit(folder, *ENCODE, "--model", "no-such-model")
    assert head.info(missing.job)["driver_exit_code"] == "7"


@pytest.mark.slow
def test_ray_job_stop_leaves_a_store_that_the_same_command_finishes(
    head: Head, tmp_path: Path
) -> None:
    source = runs.write_songs(tmp_path / "songs", 12, seconds=2.4)
    store = tmp_path / "store"
    folder = working_dir(
        tmp_path / "clone",
        source,
        carried=True,
        unit_seconds=8.0,
        batch_size=1,
        model_options={"seconds": 0.7},
    )
    job = head.submit(folder, *ENCODE, wait=False).job
    runs.until(lambda: bool(runs.commits(store)), "the first unit is committed")
    stopped = head.job("stop", job)
    assert stopped.returncode == 0, stopped.stdout
    assert head.info(job)["status"] == "STOPPED"
    kept = runs.commits(store)
    assert kept
    assert not (store / "dataset.json").exists()
    assert not (store / "tmp").exists()
    committed = {path.stem for path in store.glob("commits/*")}
    assert {path.stem for path in store.glob("shards/*")} == committed
    assert "interrupted; run the same command again to resume" in head.job("logs", job).stdout
    done = head.submit(folder, *ENCODE)
    assert done.code == 0, done.text
    runs.assert_whole(store)
    assert kept.items() <= runs.commits(store).items()
    assert len(open_store(str(store))) == 12
