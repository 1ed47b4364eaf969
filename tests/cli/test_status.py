"""`status` of a store that a run is writing to, or was."""

from __future__ import annotations

import dataclasses
import datetime
import errno
import json
import os
import signal
import socket
import subprocess
import threading
import uuid
from pathlib import Path
from typing import Any

import pytest

from latentmill.cli.show_status import StoreStatus, status
from latentmill.engine import lock, running
from latentmill.engine.holder import RunProgress, process_stamp
from latentmill.engine.lease import LEASE_PATH, Timing, hold
from latentmill.engine.running import current_run
from latentmill.fields.status import FieldStatus
from latentmill.storage.storage import Storage
from support import file_locks, runs

HERE = {"host": socket.gethostname(), "user": "ann", "since": "2026-11-28T20:49:00+00:00"}
PROGRESS = RunProgress(
    units=20,
    units_done=3,
    units_in_flight=2,
    items=40,
    items_done=7,
    failed=0,
    audio_seconds=1440.0,
    total_seconds=7200.0,
    x_real_time=20.0,
    seconds_left=288.0,
)


def shown(storage: Storage) -> list[str]:
    """The first lines for a store of 20 units of which one is committed."""
    run = current_run(storage)
    value = StoreStatus("/lat", False, 20, 1, 40, 2, 0, 0, 0.2, 1000, (), (), {}, run=run)
    return status(value).splitlines()


def write_lock(storage: Storage, pid: int, process: str | None, **more: object) -> None:
    values = {**HERE, "pid": pid, "process": process, **more}
    storage.write(lock.LOCK_PATH, json.dumps(values).encode() + b"\n what was longer before")


def test_a_store_whose_first_run_is_still_planning_is_not_called_missing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    storage = Storage(str(tmp_path / "lat"))
    write_lock(storage, os.getpid(), process_stamp(os.getpid()))
    planning = runs.call(capsys, "status", tmp_path / "lat")
    assert planning.code == 5
    assert "is planning it" in planning.err
    assert "ann@" in planning.err
    write_lock(storage, os.getpid(), "another process")
    assert "is not a latentmill store" in runs.call(capsys, "status", tmp_path / "lat").err


@pytest.mark.slow
def test_a_run_shows_itself_while_it_works_and_after_it_was_killed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    songs, store = runs.write_songs(tmp_path / "songs", 8, 4.0), tmp_path / "store"
    gate = tmp_path / "hold"
    arguments = [
        *("encode", str(songs), str(store), "--model", runs.SLOW_MODEL, "--device", "cpu"),
        *("--model-option", "seconds=0.2", "--model-option", f"hold={gate}", "--workers", "1"),
        *("--batch-size", "1", "--threads", "1", "--chunk-seconds", "0.5", "--unit-seconds", "4"),
    ]

    def progress() -> RunProgress | None:
        run = current_run(Storage(str(store)))
        return run.progress if run else None

    def is_under_way() -> bool:
        now = progress()
        if now is None or now.seconds_left is None or not now.units_done:
            return False
        committed = 4.0 * now.units_done
        return now.units_in_flight > 0 and now.audio_seconds > committed + 0.4

    with runs.started(*arguments) as process:
        runs.until(is_under_way, "a unit is committed, and another one in flight")
        gate.touch()
        text = runs.call(capsys, "status", store).out
        value = json.loads(runs.call(capsys, "status", store, "--json").out)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    first, second, *_ = text.splitlines()
    assert first.startswith(f"{store}: running: by ")
    assert f"@{socket.gethostname()}, pid {process.pid}, since 20" in first
    assert " of 8 units committed, " in second
    assert " in flight, 0.00" in second
    assert " of 0.009 h, " in second  # 8 songs of 4 seconds
    assert "x real time, less than a minute left" in second
    run = value["run"]
    assert (run["state"], run["pid"]) == ("running", process.pid)
    assert run["progress"]["units_done"] >= 1
    assert run["progress"]["units_in_flight"] >= 1
    assert 0 < run["progress"]["seconds_left"] < 60
    assert value["committed"] >= 1
    text = runs.call(capsys, "status", store).out
    assert text.startswith(f"{store}: stopped: the run of ")
    assert f"pid {process.pid} was killed; to resume, run the same command again" in text
    assert "in flight" not in text
    gate.unlink()
    runs.until(lambda: lock.is_locked(Storage(str(store))) is False, "its worker is gone")


def test_a_run_that_has_ended_in_order_is_not_shown(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    storage.write("plan/plan.json", b"{}")
    with lock.only_run(storage) as held:
        run = current_run(storage)
        assert run is not None
        assert (run.state, run.pid, run.progress) == ("running", os.getpid(), None)
        held.publish(PROGRESS)
        held.publish(PROGRESS.model_copy(update={"x_real_time": None}))
        run = current_run(storage)
        assert run is not None
        assert run.progress == PROGRESS.model_copy(update={"x_real_time": None})
        held.publish(PROGRESS.model_copy(update={"units_in_flight": 0}))
        assert "20 units committed, starting the workers, 0.400 of" in shown(storage)[1]
    assert current_run(storage) is None
    assert (tmp_path / ".lock").read_bytes() == b""


def test_nobody_is_shown_where_nobody_writes(tmp_path: Path) -> None:
    for storage in (Storage(str(tmp_path)), Storage(f"memory://{uuid.uuid4().hex}/latents")):
        assert current_run(storage) is None
        assert (
            shown(storage)[0] == "/lat: not complete; to resume, run the same encode command again"
        )
    (tmp_path / ".lock").touch()  # as an older version has left it
    assert current_run(Storage(str(tmp_path))) is None


@pytest.mark.parametrize("held", [True, False])
@pytest.mark.parametrize("nfs", [True, False])
def test_a_process_of_another_machine_runs_as_long_as_the_lock_is_held(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nfs: bool, held: bool
) -> None:
    if nfs:
        file_locks.as_on_nfs(monkeypatch)
    storage = Storage(str(tmp_path))
    write_lock(storage, 7, "another-boot pid:[1] 7 1", progress=PROGRESS.model_dump())
    member = lock.Membership(storage) if held else None
    first, second = shown(storage)[:2]
    if member is not None:
        member.close()
        assert (
            first == f"/lat: running: by ann@{HERE['host']}, pid 7, since 2026-11-28 20:49:00 UTC"
        )
        assert second == (
            "progress  3 of 20 units committed, 2 in flight, 0.400 of 2.000 h, 20.0x real time, "
            "about 5 minutes left"
        )
    else:
        assert first.startswith(f"/lat: stopped: the run of ann@{HERE['host']}, pid 7 was killed")
        assert second.startswith("units")


@pytest.mark.parametrize("nfs", [True, False])
def test_the_lock_is_seen_without_the_right_to_write_to_it_except_on_nfs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nfs: bool
) -> None:
    storage, real = Storage(str(tmp_path)), Path.open
    write_lock(storage, 7, "another-boot pid:[1] 7 1", progress=PROGRESS.model_dump())
    member = lock.Membership(storage)

    def refuse(path: Path, mode: str = "r", *rest: Any, **more: Any) -> Any:
        if path.name == lock.LOCK_PATH and mode != "rb":
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        return real(path, mode, *rest, **more)

    monkeypatch.setattr(Path, "open", refuse)  # root may write to everything
    if nfs:
        file_locks.as_on_nfs(monkeypatch)
    run = current_run(storage)
    assert run is not None
    first, second = shown(storage)[:2]
    field = FieldStatus("text", items=40)
    value = StoreStatus("/lat", True, 20, 20, 40, 40, 0, 0, 0.2, 1000, (), (), {}, fields=(field,))
    lines = status(dataclasses.replace(value, field_runs={"text": run})).splitlines()
    member.close()
    who = f"ann@{HERE['host']}, pid 7, since 2026-11-28 20:49:00 UTC"
    unknown = (
        f"unknown: the run of {who}, did not end normally, and this machine cannot see whether "
        "it is running; if it was killed, "
    )
    assert first == "/lat: " + (
        f"{unknown}run the same command again to resume" if nfs else f"running: by {who}"
    )
    assert second.startswith("progress  3 of 20 units committed")
    if nfs:
        assert lines[-1] == f"  {unknown}rerun the `latentmill add` command of this field"
    else:
        assert lines[-1].startswith("  running: by ann@")


def test_a_dead_process_of_this_machine_has_stopped_though_its_workers_hold_the_lock(
    tmp_path: Path,
) -> None:
    storage = Storage(str(tmp_path))
    with subprocess.Popen(["sleep", "60"]) as sleeping:
        write_lock(storage, sleeping.pid, process_stamp(sleeping.pid))
        worker = lock.Membership(storage)
        assert shown(storage)[0].startswith("/lat: running: by ann@")
        assert shown(storage)[1] == "progress  listing the source"
        sleeping.kill()
        runs.until(lambda: not runs.alive(sleeping.pid), "it is dead")
        assert shown(storage)[0].startswith("/lat: stopped")
    worker.close()


def lease(storage: Storage, beat: str, **changes: object) -> None:
    """A lease as a run on another machine writes it; its clock is an hour behind."""
    values = {
        **HERE,
        **{"host": "elsewhere", "pid": 7, "process": "another-boot pid:[1] 7 1"},
        **{"owner": "b" * 32, "dead_after": 60.0, "progress": PROGRESS.model_dump()},
        **{"heartbeat": f"2026-11-28T19:{beat}+00:00", **changes},
    }
    storage.write(LEASE_PATH, json.dumps(values).encode())


@pytest.mark.parametrize("fate", ["beats", "silent", "ends"])
def test_a_lease_of_another_machine_is_watched_for_a_heartbeat(
    monkeypatch: pytest.MonkeyPatch, fate: str
) -> None:
    monkeypatch.setattr(running, "HEARTBEAT_WAIT_SECONDS", 0.5 if fate == "silent" else 30.0)
    storage = Storage(f"memory://{uuid.uuid4().hex}/latents")
    lease(storage, "50:00")
    change = {"beats": lambda: lease(storage, "50:05"), "ends": lambda: storage.delete(LEASE_PATH)}
    timer = threading.Timer(0.2, change.get(fate, lambda: None))
    timer.start()
    first, *_ = shown(storage)
    timer.join()
    who = "ann@elsewhere, pid 7, since 2026-11-28 20:49:00 UTC"
    assert (
        first
        == {
            "beats": f"/lat: running: by {who}",
            "ends": "/lat: not complete; to resume, run the same encode command again",
            "silent": f"/lat: unknown: the run of {who}, sent no heartbeat while `status` "
            "waited (last heartbeat: 2026-11-28 19:50:00 UTC, by its own clock); if it was "
            "killed, run the same command again to resume",
        }[fate]
    )


def test_the_heartbeat_of_a_lease_carries_the_progress() -> None:
    storage = Storage(f"memory://{uuid.uuid4().hex}/latents")
    with hold(storage, Timing(period=0.05, settle=0.01)) as held:
        run = current_run(storage)
        assert run is not None
        assert (run.state, run.progress) == ("running", None)
        assert run.heartbeat is not None
        assert datetime.datetime.fromisoformat(run.heartbeat).tzinfo is not None
        held.publish(PROGRESS)

        def is_there() -> bool:
            found = current_run(storage)
            return found is not None and found.progress == PROGRESS

        runs.until(is_there, "the next heartbeat")
    assert current_run(storage) is None
