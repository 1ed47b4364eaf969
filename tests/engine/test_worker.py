"""A worker without Ray: two units at once, and what stays of a unit that is stopped."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import sys
import threading
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fsspec
import numpy as np
import pytest
from fsspec.implementations.memory import MemoryFile, MemoryFileSystem

from latentmill.config import fingerprint_document, load_config
from latentmill.encoding.chunks import Chunking
from latentmill.encoding.fingerprint import fingerprint
from latentmill.encoding.timings import Timings
from latentmill.engine.job import make_job
from latentmill.engine.worker import Job, Stopped, Worker
from latentmill.errors import SourceError
from latentmill.models import registry
from latentmill.plan import Plan, Unit, UnitLimits, draft, freeze, read_items
from latentmill.sources.base import Item
from latentmill.sources.folder import FolderSource
from latentmill.storage.storage import Storage
from latentmill.store.commit import read_commits
from support import runs
from support.gated_server import PARTS, gated
from support.in_process import encode, in_process, spoil, tone


def prepared(
    folder: Path, store: Path | str, songs_per_unit: int = 2, **options: object
) -> tuple[Job, Plan]:
    """A frozen plan of three units of songs, and a job for it."""
    songs = runs.write_songs(folder, 3 * songs_per_unit)
    values = {"source": str(songs), "out": str(store), "device": "cpu", **options}
    config = load_config(None, values)
    handle = registry.resolve(config.model, config.model_options)
    chunking = Chunking.for_model(handle.spec, seconds=config.chunk_seconds)
    plan = Plan(
        source=str(songs),
        fingerprint=fingerprint_document(config, handle.spec, chunking),
        model=config.model,
        model_options={},
        format=config.format,
        ignored={},
    )
    items = FolderSource(str(songs), ("wav",)).items()
    with draft(items, UnitLimits(1.2 * songs_per_unit)) as drafted:
        plan = freeze(plan, drafted, Storage(str(store)))
    assert len(plan.units) == 3
    return make_job(config, handle, chunking, plan, device="cpu", threads=1), plan


def shards(store: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (store / "shards").iterdir()}


@pytest.mark.parametrize("format_name", ["parquet", "webdataset"])
def test_two_threads_give_the_same_shards_as_one(tmp_path: Path, format_name: str) -> None:
    job, plan = prepared(tmp_path / "songs", tmp_path / "one", format=format_name)
    worker = Worker(job)
    results = [worker.encode(unit) for unit in plan.units]
    worker.close()
    assert [(r.unit, r.encoded, r.failed) for r in results] == [(0, 2, 0), (1, 2, 0), (2, 2, 0)]
    assert results[0].audio_seconds == pytest.approx(worker.timings()["audio_seconds"] / 3, rel=0.2)

    job, plan = prepared(tmp_path / "songs", tmp_path / "two", format=format_name)
    worker = Worker(job)
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(worker.encode, plan.units))
    worker.close()
    assert shards(tmp_path / "two") == shards(tmp_path / "one")
    commits = read_commits(Storage(str(tmp_path / "two")))
    assert {commit.fingerprint for commit in commits.values()} == {fingerprint(plan.fingerprint)}


@pytest.mark.parametrize("format_name", ["parquet", "webdataset"])
def test_a_sidecar_costs_its_item_never_its_unit(tmp_path: Path, format_name: str) -> None:
    """Python's JSON recurses: how deep it gets depends on the calls around it."""
    songs = runs.write_songs(tmp_path / "songs", 9)
    depths = [400, 600, 900, *range(930, 1000, 20), 1100, 5000]
    for path, depth in zip(sorted(songs.rglob("*.wav")), depths, strict=True):
        path.with_suffix(".json").write_text('{"a":' * depth + "1" + "}" * depth)
    job, plan = prepared(
        tmp_path / "songs", tmp_path / "store", 3, format=format_name, load_threads=2
    )
    worker = Worker(job)
    results = [worker.encode(unit) for unit in plan.units]
    worker.close()
    assert [(r.encoded, r.failed) for r in results] == [(1, 2), (0, 3), (0, 3)]
    reasons = [reason for result in results for _, reason in result.failures]
    assert all("nested more than 500 levels" in r or "is not valid JSON" in r for r in reasons)


def test_a_stopped_worker_leaves_nothing_of_its_units(tmp_path: Path) -> None:
    log = tmp_path / "log"
    options = {"seconds": 0.2, "log": str(log)}
    job, plan = prepared(
        tmp_path / "songs",
        tmp_path / "store",
        songs_per_unit=6,
        model=runs.SLOW_MODEL,
        model_options=options,
        chunk_seconds=0.5,
        batch_size=1,
    )
    stopped = threading.Event()
    before = threading.active_count()
    worker = Worker(job, stopped)
    with ThreadPoolExecutor(2) as pool:
        futures = [pool.submit(worker.encode, unit) for unit in plan.units]
        runs.until(log.exists, "the model works")
        stopped.set()
        errors = [future.exception(timeout=runs.PATIENCE_SECONDS) for future in futures]
    worker.close()
    assert [type(error) for error in errors] == [Stopped] * 3
    assert not list((tmp_path / "store").glob("tmp/*"))
    assert not (tmp_path / "store" / "commits").exists()
    assert threading.active_count() <= before


def test_a_download_on_trial_is_progress(tmp_path: Path) -> None:
    """Else the worker would be replaced, and the unit would never be finished."""
    job, plan = prepared(tmp_path / "songs", tmp_path / "store")
    path = Path(read_items(Storage(str(tmp_path / "store")), plan.units[0])[0].uri)
    timings = Timings()
    with (
        gated(path.read_bytes()) as (url, gate),
        contextlib.closing(Worker(job)) as worker,
        ThreadPoolExecutor(1) as pool,
    ):
        item = Item("a", url, path.stat().st_size, "")
        refused = pool.submit(worker._refused, [item], timings)
        try:
            runs.until(lambda: timings.steps > 0, "the trial has begun")
            for _ in range(1, PARTS):
                before = timings.steps
                gate.pass_part()
                runs.until(lambda before=before: timings.steps > before, "a part has arrived")  # type: ignore[misc]
                assert not refused.done()
        finally:
            gate.open()
        assert refused.result() == {}


def test_an_upload_is_progress(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the worker would be replaced during a slow upload, and the unit never finished."""
    job, plan = prepared(tmp_path / "songs", f"memory://{uuid.uuid4().hex}/store")
    worker = Worker(job)
    steps: list[float] = []
    write = MemoryFile.write

    def noted(file: MemoryFile, data: bytes) -> int:
        steps.append(worker.timings()["steps"])
        return write(file, data)

    monkeypatch.setattr(MemoryFileSystem, "blocksize", 1000)  # bytes of an upload in one write
    monkeypatch.setattr(MemoryFile, "write", noted)
    assert worker.encode(plan.units[0]).encoded == 2
    worker.close()
    assert len(steps) > 10
    assert steps == list(range(int(steps[0]), int(steps[0]) + len(steps)))


def test_the_origin_is_the_latent_of_silence(tmp_path: Path) -> None:
    job, _ = prepared(tmp_path / "songs", tmp_path / "store")
    worker = Worker(job)
    origin = worker.origin()
    worker.close()
    spec = job.model.spec
    assert origin.shape == (spec.latent_channels, spec.frames(job.chunking.samples))
    assert not np.any(origin)  # the MDCT is linear


def test_a_worker_needs_no_ray() -> None:
    """What a machine without Ray can import: planning, the job, the worker, the models."""
    code = (
        "import sys; sys.modules['ray'] = None; "
        "import latentmill.engine.job, latentmill.engine.worker, latentmill.run.prepare, "
        "latentmill.models.registry"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)


def paths_of(store: Path, unit: Unit) -> list[Path]:
    return [Path(item.uri) for item in read_items(Storage(str(store)), unit)]


@pytest.mark.parametrize("mount_point", [True, False])
def test_without_the_mount_nothing_is_committed(tmp_path: Path, mount_point: bool) -> None:
    songs, store = tmp_path / "songs", tmp_path / "store"
    job, plan = prepared(songs, store)
    worker = Worker(job)
    songs.rename(tmp_path / "unmounted")
    if mount_point:
        songs.mkdir()
    for unit in plan.units[:2]:
        with pytest.raises(SourceError, match=rf"^Host \S+ cannot read any .* of {songs} "):
            worker.encode(unit)
    assert not list(store.glob("shards/*"))
    assert read_commits(Storage(str(store))) == {}
    if mount_point:
        songs.rmdir()
    (tmp_path / "unmounted").rename(songs)
    assert [worker.encode(unit).encoded for unit in plan.units] == [2, 2, 2]
    worker.close()


def test_a_source_that_is_lost_while_files_of_it_are_missing(tmp_path: Path) -> None:
    songs, store = tmp_path / "songs", tmp_path / "store"
    job, plan = prepared(songs, store, songs_per_unit=3)
    gone = paths_of(store, plan.units[0])[-1]
    gone.unlink()
    worker = Worker(job)
    assert worker.encode(plan.units[0]).failed == 1
    shutil.rmtree(songs)
    with pytest.raises(SourceError, match=f"{songs}.*No such file"):
        worker.encode(plan.units[1])
    worker.close()


@pytest.mark.parametrize("change", [Path.unlink, spoil])
def test_deleted_and_damaged_files_fail(tmp_path: Path, change: Callable[[Path], None]) -> None:
    store = tmp_path / "store"
    job, plan = prepared(tmp_path / "songs", store)
    for path in paths_of(store, plan.units[0]):
        change(path)
    worker = Worker(job)
    assert [worker.encode(unit).failed for unit in plan.units] == [2, 0, 0]
    worker.close()


@pytest.mark.parametrize("place", ["memory://absent/songs", "songs"])
def test_files_of_a_manifest(tmp_path: Path, place: str) -> None:
    folder = place if "://" in place else str(tmp_path / place)
    tone(tmp_path / "song.wav", 5000)
    fs, root = fsspec.core.url_to_fs(folder)
    fs.makedirs(root, exist_ok=True)
    manifest = tmp_path / "list" / "songs.csv"
    manifest.parent.mkdir()
    manifest.write_text(f"path\n{folder}/a.wav\n{folder}/b.wav\n")
    with in_process(), pytest.raises(SourceError, match=r"cannot read any of the planned files"):
        encode(manifest, tmp_path / "store")
    fs.put_file(str(tmp_path / "song.wav"), f"{root}/b.wav")
    with in_process():
        done = encode(manifest, tmp_path / "other")
    assert done.info.encoded == 1
    assert [reason for _, reason in done.failures] == ["there is no such file"]
