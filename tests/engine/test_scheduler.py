"""Units on real workers that fail, hang and die: what is tried again, what is named, what stays."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from ray.exceptions import RayTaskError

from latentmill.config import RunConfig, load_config
from latentmill.engine import scheduler as scheduler_module
from latentmill.engine.actor import ActorShape
from latentmill.engine.dispatch import Dispatch
from latentmill.engine.progress import Progress
from latentmill.engine.scheduler import Scheduler, _Call
from latentmill.engine.worker_slot import WorkerSlot
from latentmill.errors import LoadTaskError, StorageError, UnitsFailedError
from latentmill.plan import Unit
from latentmill.run.forecast import forecast
from latentmill.run.run import RunSummary, run
from support import runs
from support.in_process import in_process

SEGFAULT = 22051  # see support/deadly
TROUBLED_MODEL = "python:support.troubled_model:build"


class Ear(Progress):
    """Remembers what it is told."""

    def __init__(self) -> None:
        self.lost: list[tuple[int, int, str]] = []
        self.counts: list[tuple[int, int]] = []

    def unit_lost(self, unit: Unit, attempt: int, reason: str) -> None:
        self.lost.append((unit.number, attempt, reason))

    def workers(self, ready: int, starting: int) -> None:
        self.counts.append((ready, starting))

    def tick(self, now: object) -> None:
        """Not remembered."""


def config(songs: Path, store: Path, **options: Any) -> RunConfig:
    values = {"device": "cpu", "threads": 1, "workers": 1, "unit_seconds": 3.0, **options}
    return load_config(None, {"source": str(songs), "out": str(store), **values})


def encode(songs: Path, store: Path, ear: Ear, **options: Any) -> RunSummary:
    return run(config(songs, store, **options), ear)


def messages_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What was logged, without what a busy machine adds."""
    return [text for text in caplog.messages if not text.startswith("no worker is ready")]


@pytest.fixture(scope="module")
def songs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.write_songs(tmp_path_factory.mktemp("songs"), 6)


def test_the_item_that_kills_its_workers_is_named_and_the_others_are_encoded(
    tmp_path: Path, ray_session: Path, caplog: pytest.LogCaptureFixture
) -> None:
    songs = runs.write_songs(tmp_path / "songs", 6)
    noise = np.random.default_rng(0).uniform(-0.3, 0.3, SEGFAULT)
    soundfile.write(songs / "album 1" / "song 04b.wav", noise, SEGFAULT)
    ear = Ear()
    summary = encode(songs, tmp_path / "store", ear)
    reason = "loading it kills the process (SIGSEGV)"
    assert summary.failures == (("album 1/song 04b", reason),)
    assert summary.exit_code == 3
    assert (summary.info.encoded, summary.info.failed) == (6, 1)
    runs.assert_whole(tmp_path / "store")
    poison = {number for number, attempt, _ in ear.lost if attempt == 2}
    assert len(poison) == 1
    assert all("died without an error message" in reason for *_, reason in ear.lost)
    assert messages_of(caplog) == [
        f"unit {poison.pop():06d}: loading its items on trial before the last attempt"
    ]


def test_a_unit_that_cannot_be_written_fails_and_the_others_do_not(
    songs: Path, tmp_path: Path, ray_session: Path
) -> None:
    store, ear = tmp_path / "store", Ear()
    forecast(config(songs, store), Progress(), calibrated=False)
    blocked = [store / "commits" / f"000001{n}.json" for n in ("", ".r1", ".r2", ".r3", ".r4")]
    for path in blocked:  # an attempt that comes after another one writes the next revision
        (path / "in the way").mkdir(parents=True)
    # Which of them depends on whether another unit was still open at its last attempt.
    ends = (StorageError, UnitsFailedError)
    with pytest.raises(ends, match=r"commits/000001\S*\.json: Is a directory"):
        run(config(songs, store), ear)
    assert {unit for unit, *_ in ear.lost} == {1}
    for path in blocked:
        shutil.rmtree(path)
    done = runs.commits(store)
    assert sorted(done) == ["000000.json", "000002.json"]
    with in_process():
        run(config(songs, store), ear)
    runs.assert_whole(store)
    assert {name: data for name, data in runs.commits(store).items() if name in done} == done


def test_an_interrupt_is_noted_before_the_workers_stop(
    songs: Path, tmp_path: Path, ray_session: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Interrupting(Ear):
        def workers(self, ready: int, starting: int) -> None:
            if ready:
                raise KeyboardInterrupt

    with caplog.at_level(logging.INFO, "latentmill"), pytest.raises(KeyboardInterrupt):
        encode(songs, tmp_path / "store", Interrupting())
    assert messages_of(caplog) == ["interrupted: stopping the workers"]
    assert not (tmp_path / "store/tmp").exists()


@pytest.mark.parametrize(
    ("trouble", "seconds_without_progress", "reason"),
    [
        ("cuda", 900, "AcceleratorError: CUDA error: an illegal memory access was encountered"),
        pytest.param(
            "kill",
            900,
            "its process died without an error message (it crashed, or was killed by SIGKILL",
            marks=pytest.mark.slow,
        ),
        ("hang", 12, "no progress for 0.2 minutes"),
    ],
)
def test_a_worker_in_trouble_is_replaced(
    songs: Path,
    tmp_path: Path,
    ray_session: Path,
    trouble: str,
    seconds_without_progress: float,
    reason: str,
) -> None:
    ear = Ear()
    options = {"trouble": trouble, "mark": str(tmp_path / "mark")}
    summary = encode(
        songs,
        tmp_path / "store",
        ear,
        model=TROUBLED_MODEL,
        model_options=options,
        stall_minutes=seconds_without_progress / 60,
    )
    assert summary.exit_code == 0
    assert summary.info.encoded == 6
    runs.assert_whole(tmp_path / "store")
    assert {attempt for _, attempt, _ in ear.lost} == {1}
    assert all(text.startswith(reason) for *_, text in ear.lost)
    assert (1, 0) in ear.counts


def test_a_device_out_of_memory_is_survived_in_place(
    songs: Path, tmp_path: Path, inline: None
) -> None:
    ear = Ear()
    options = {"trouble": "memory", "mark": str(tmp_path / "mark")}
    summary = encode(
        songs,
        tmp_path / "store",
        ear,
        model=TROUBLED_MODEL,
        model_options=options,
        chunk_seconds=0.25,
        batch_size=3,
    )
    assert (tmp_path / "mark").exists()
    assert summary.exit_code == 0
    assert ear.lost == []


def test_workers_that_are_not_placed_hold_no_units(
    songs: Path, tmp_path: Path, ray_session: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More are asked for than the cluster has room for, as where an autoscaler is slow."""
    import ray

    cpus = int(ray.cluster_resources()["CPU"])
    built = Scheduler.__init__

    def greedy(self: Scheduler, job: Any, shape: Any, wanted: Any, *args: Any, **rest: Any) -> None:
        built(self, job, shape, lambda: cpus + 2, *args, **rest)

    monkeypatch.setattr(Scheduler, "__init__", greedy)
    ear = Ear()
    encode(songs, tmp_path / "store", ear, workers=None, unit_seconds=1.0)
    runs.assert_whole(tmp_path / "store")
    assert max(ready for ready, _ in ear.counts) <= cpus
    assert max(starting for _, starting in ear.counts) >= 2


def test_an_error_of_load_tasks_names_their_host_and_not_that_of_the_worker() -> None:
    slot = WorkerSlot(actor=None, ready=True, placed=True, place="process 7 on gpu-1")
    full = "Cannot write temporary files to /tmp: No space left on device"
    assert str(slot.located(StorageError(full))) == f"process 7 on gpu-1: {full}"
    of_task = LoadTaskError(f"Load tasks cannot work on cpu-3: {full}")
    assert slot.located(of_task) is of_task


def test_a_worker_that_cannot_even_be_asked_is_given_up_with_its_units(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ear, unit = Ear(), Unit(7, 1, 1.0)
    scheduler = Scheduler(None, ActorShape(1, 0), lambda: 1, ear)  # type: ignore[arg-type]
    monkeypatch.setattr(scheduler_module.ray, "kill", lambda actor: None)
    scheduler._dispatch = Dispatch([unit])
    slot = WorkerSlot(actor=None, ready=True)
    scheduler._slots = [slot]
    assignment = scheduler._dispatch.next(slot, [])
    assert assignment is not None
    slot.assign("reference", assignment)
    error = RayTaskError("timings", "traceback", cause=KeyError("rss"))
    scheduler._failed(_Call(slot, "report"), "other", error)
    assert ear.lost == [(7, 1, "KeyError: 'rss'")]
    assert not scheduler._slots
    assert scheduler._dispatch.open == 1  # to be tried again
