"""The lease of a run on a bucket: who has it, who is refused, who takes over, who stops."""

from __future__ import annotations

import datetime
import json
import os
import pickle
import subprocess
import threading
import time
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest

from latentmill.engine import lease as lease_module
from latentmill.engine.holder import process_stamp
from latentmill.engine.lease import LEASE_PATH, Lease, Timing, check_owner, hold
from latentmill.engine.lock import Membership, only_run
from latentmill.errors import StorageError, StoreError
from latentmill.plan import PLAN_PATH
from latentmill.storage.storage import Storage
from latentmill.store.schema import DATASET_PATH
from support import runs

QUICK = Timing(period=0.05, dead_after=1.0, settle=0.2, poll=0.02)
LONG = 600.0  # seconds without a heartbeat that no test waits for

OneSentence = Callable[[BaseException], str]


@pytest.fixture(params=["memory", "s3"])
def storage(request: pytest.FixtureRequest) -> Storage:
    if request.param == "s3":
        return Storage(request.getfixturevalue("s3_bucket") + "/latents")
    return Storage(f"memory://{uuid.uuid4().hex}/latents")


# Of what takes a second and does not depend on the kind of storage.
in_memory = pytest.mark.parametrize("storage", ["memory"], indirect=True)


def document(storage: Storage) -> dict[str, object]:
    parsed: dict[str, object] = json.loads(storage.read(LEASE_PATH))
    return parsed


def foreign(storage: Storage, **changes: object) -> dict[str, object]:
    """Leave a lease as a run on another machine has written it just now."""
    values = {
        "owner": uuid.uuid4().hex,
        "host": "elsewhere",
        "pid": 7,
        "process": "another-boot pid:[1] 7 1",
        "heartbeat": datetime.datetime.now(datetime.UTC).isoformat(),
        "dead_after": QUICK.dead_after,
        **changes,
    }
    storage.write(LEASE_PATH, json.dumps(values).encode())
    return values


def test_a_lease_beats_and_is_gone_at_the_end(storage: Storage) -> None:
    with hold(storage, QUICK) as lease:
        first = document(storage)
        assert first["owner"] == lease.owner
        assert first["pid"] == os.getpid()
        runs.until(lambda: document(storage)["heartbeat"] != first["heartbeat"], "a beat")
        lease.check()
        check_owner(storage, lease.owner)
    assert not storage.exists(LEASE_PATH)


def test_a_second_run_is_refused_in_one_sentence(
    storage: Storage, one_sentence: OneSentence
) -> None:
    with hold(storage, QUICK) as lease:
        with pytest.raises(StoreError) as refused, hold(storage, QUICK):
            pass
        text = one_sentence(refused.value)
        assert text.startswith(f"Another run is writing to {storage.root} (process {os.getpid()}")
        lease.check()
        assert document(storage)["owner"] == lease.owner


def test_a_beating_lease_of_another_machine_is_left_alone(storage: Storage) -> None:
    values = foreign(storage, dead_after=LONG)
    over = threading.Event()

    def beat() -> None:
        while not over.wait(0.05):
            now = datetime.datetime.now(datetime.UTC).isoformat()
            storage.write(LEASE_PATH, json.dumps({**values, "heartbeat": now}).encode())

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        with pytest.raises(StoreError, match="process 7 on elsewhere"), hold(storage, QUICK):
            pass
    finally:
        over.set()
        thread.join()
    assert document(storage)["owner"] == values["owner"]


@in_memory
def test_a_lease_that_stands_still_is_taken_over_after_its_time(storage: Storage) -> None:
    foreign(storage)
    began = time.monotonic()
    with hold(storage, QUICK) as lease:
        assert time.monotonic() - began > QUICK.dead_after
        assert document(storage)["owner"] == lease.owner


@in_memory
def test_a_lease_of_a_dead_process_of_this_machine_is_taken_over_at_once(storage: Storage) -> None:
    with subprocess.Popen(["sleep", "60"]) as sleeping:
        stamp = process_stamp(sleeping.pid)
        sleeping.kill()
    foreign(storage, process=stamp, pid=sleeping.pid, dead_after=LONG)
    began = time.monotonic()
    with hold(storage, QUICK):
        assert time.monotonic() - began < LONG


@in_memory
@pytest.mark.parametrize(
    "clock",
    [
        datetime.timedelta(hours=-2),
        datetime.timedelta(hours=2),
        "2020-01-01T00:00:00",  # without a zone
        "beat 7",
    ],
)
def test_what_a_heartbeat_says_does_not_matter_only_whether_it_changes(
    storage: Storage, clock: datetime.timedelta | str
) -> None:
    """The clocks of two machines may differ by hours: a living run's lease is not taken."""
    now = datetime.datetime.now(datetime.UTC)
    heartbeat = clock if isinstance(clock, str) else (now + clock).isoformat()
    values = foreign(storage, heartbeat=heartbeat, dead_after=LONG)
    over = threading.Event()

    def beat() -> None:
        count = 0
        while not over.wait(0.3):
            count += 1
            changed = {**values, "heartbeat": f"{heartbeat} {count}"}
            storage.write(LEASE_PATH, json.dumps(changed).encode())

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        with pytest.raises(StoreError, match="process 7 on elsewhere"), hold(storage, QUICK):
            pass
    finally:
        over.set()
        thread.join()
    assert document(storage)["owner"] == values["owner"]

    foreign(storage, heartbeat=heartbeat)
    began = time.monotonic()
    with hold(storage, QUICK):
        assert time.monotonic() - began > QUICK.dead_after


def test_of_many_takers_of_a_dead_lease_one_has_it(storage: Storage) -> None:
    past = datetime.datetime.now(datetime.UTC) - datetime.timedelta(hours=2)
    foreign(storage, heartbeat=past.isoformat())
    timing = replace(QUICK, settle=2.0)  # more than a taker needs between reading and deleting
    start = threading.Barrier(6)
    held: list[str] = []
    most = 0
    over = threading.Event()

    def take(_: int) -> str:
        nonlocal most
        start.wait()
        try:
            with hold(storage, timing) as lease:
                held.append(lease.owner)
                most = max(most, len(held))
                over.wait()
                held.remove(lease.owner)
        except StoreError:
            return "refused"
        return "held"

    with ThreadPoolExecutor(6) as pool:
        results = [pool.submit(take, number) for number in range(6)]
        try:
            runs.until(lambda: sum(one.done() for one in results) == 5, "five are refused")
        finally:
            over.set()
        assert sorted(one.result() for one in results) == ["held"] + ["refused"] * 5
    assert most == 1


@in_memory
def test_a_slow_holder_that_writes_itself_back_keeps_the_lease(
    storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = foreign(storage, heartbeat="2020-01-01T00:00:00+00:00")
    create = Storage.create

    def slow_holder_returns(self: Storage, path: str, data: bytes) -> bool:
        created = create(self, path, data)
        if path == LEASE_PATH and created:
            now = datetime.datetime.now(datetime.UTC).isoformat()
            back = {**values, "heartbeat": now, "dead_after": LONG}
            self.write(LEASE_PATH, json.dumps(back).encode())
            threading.Timer(
                QUICK.settle + 0.3,
                lambda: self.write(
                    LEASE_PATH, json.dumps({**back, "heartbeat": now + "0"}).encode()
                ),
            ).start()
        return created

    monkeypatch.setattr(Storage, "create", slow_holder_returns)
    with pytest.raises(StoreError, match="elsewhere"), hold(storage, QUICK):
        pass
    assert document(storage)["owner"] == values["owner"]


def test_a_run_that_lost_its_lease_stops_and_leaves_the_other_ones(
    storage: Storage, one_sentence: OneSentence
) -> None:
    with hold(storage, QUICK) as lease:
        while lease._lost is None:  # a beat may just have been under way
            values = foreign(storage)
            time.sleep(0.2)
        with pytest.raises(StoreError) as lost:
            lease.check()
        assert "lost its lease" in one_sentence(lost.value)
        assert "process 7 on elsewhere" in str(lost.value)
        with pytest.raises(StoreError, match="Another run has started to write"):
            check_owner(storage, lease.owner)
    assert document(storage) == values


def test_a_run_that_slept_looks_before_it_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    storage = Storage(f"memory://{uuid.uuid4().hex}/latents")
    sleepy = Timing(period=60.0, dead_after=720.0, settle=0.0)
    limit = sleepy.dead_after - 2 * sleepy.period
    with hold(storage, sleepy) as lease:
        before = document(storage)["heartbeat"]
        lease.check()
        assert document(storage)["heartbeat"] == before
        lease._renewed -= limit  # as if this process had been suspended
        lease.check()  # overdue, but nobody took it
        assert document(storage)["heartbeat"] != before
        lease._renewed -= limit
        foreign(storage)
        with pytest.raises(StoreError, match="lost its lease"):
            lease.check()
        storage.delete(LEASE_PATH)

    def fails(self: Storage, path: str) -> bytes | None:
        raise StorageError("Cannot read it: it is away.")

    with hold(storage, sleepy) as lease, monkeypatch.context() as patch:
        patch.setattr(Storage, "read_if_exists", fails)
        lease.check()  # not overdue: it is not even looked at
        lease._renewed -= limit
        with pytest.raises(StorageError):
            lease.check()


def test_files_that_runs_replace_are_written_where_versions_cannot_be_compared() -> None:
    storage = Storage(f"memory://{uuid.uuid4().hex}/latents")
    storage.write(PLAN_PATH, b"of an earlier run")
    with hold(storage, QUICK) as lease:
        for path in (PLAN_PATH, DATASET_PATH):
            for data in (b"1", b"2"):
                lease.storage.write(path, data)
                assert storage.read(path) == data


def test_what_checks_the_lease_is_not_replaced_by_a_copy_that_does_not() -> None:
    with (
        hold(Storage(f"memory://{uuid.uuid4().hex}/latents"), QUICK) as lease,
        pytest.raises(TypeError, match="cannot be pickled"),
    ):
        pickle.dumps(lease.storage)


def test_a_beat_that_fails_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    storage = Storage(f"memory://{uuid.uuid4().hex}/latents")
    failing, failed = threading.Event(), threading.Event()
    beat = Lease._beat

    def sometimes(self: Lease) -> None:
        if failing.is_set():
            failed.set()
            raise StorageError("Cannot write it: it is away.")
        beat(self)

    monkeypatch.setattr(Lease, "_beat", sometimes)
    with hold(storage, QUICK) as lease:
        failing.set()
        assert failed.wait(runs.PATIENCE_SECONDS)
        stood_still = document(storage)["heartbeat"]
        failing.clear()
        runs.until(lambda: document(storage)["heartbeat"] != stood_still, "it beats again")
        lease.check()


@pytest.mark.parametrize("dead_after", [None, 0, -1, 1e9, float("inf"), float("nan")])
def test_what_is_no_lease_is_named(
    storage: Storage, one_sentence: OneSentence, dead_after: float | None
) -> None:
    if dead_after is None:
        storage.write(LEASE_PATH, b"something else")
    else:
        foreign(storage, dead_after=dead_after)
    with pytest.raises(StoreError) as error, hold(storage, QUICK):
        pass
    assert LEASE_PATH in one_sentence(error.value)


def test_workers_of_a_bucket_look_for_their_runs_lease(
    s3_bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease_module, "Timing", lambda: Timing(period=60.0, settle=0.1))
    storage = Storage(s3_bucket + "/latents")
    with only_run(storage) as held:
        worker = Membership(storage, held.owner)
        worker.storage.write("a", b"1")
        foreign(storage)
        for holder in (worker, held):
            with pytest.raises(StoreError, match="Another run has started"):
                holder.storage.write("a", b"2")
        worker.close()
        assert storage.read("a") == b"1"
