"""A fault at every single operation of every command that writes a store.

A command runs once undisturbed, which counts its operations on the storage. Then, for each of them
and for each way in which it can go wrong, it runs again from the same state: readers look at what
is there after the fault, the command runs a second time, and the result must be the undisturbed
one, item by item.
"""

from __future__ import annotations

import os
import random
import tempfile
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec
import pytest
from operation_scenarios import (
    SCENARIOS,
    Content,
    Outcome,
    Place,
    Scenario,
    assert_whole,
    contents,
    copied,
    open_uploads,
    state_of,
)

from latentmill.errors import LatentmillError
from latentmill.storage.storage import Storage
from latentmill.store.store import LatentStore, open_store
from latentmill.store.tidy import abort_uploads, tidy
from support.operation_faults import (
    READ_MODES,
    READS,
    WRITE_MODES,
    Faults,
    Killed,
    faults_on,
    is_write,
)

WHOLE = ("delete", "rm_file", "pipe_file")  # which no process is killed in the middle of
Trial = tuple[int, str]  # the number of an operation, and what happens at it


@dataclass
class Undisturbed:
    """A command that ran without a fault.

    Attributes:
        begin: The state before it.
        operations: What it did.
        before: What the store held before; None: there was none.
        after: What it holds after.
        atomic: As in the scenario.
    """

    begin: Place
    operations: list[tuple[str, str]]
    before: Outcome | None
    after: Outcome | None
    atomic: bool = False


def undisturbed(scenario: Scenario, root: str, source: Path) -> Undisturbed:
    begin = Place(f"{root}/begin", source)
    source.mkdir()
    with faults_on(Faults()):
        if "://" not in root:
            Path(begin.root).mkdir(parents=True)
        scenario.begin(begin)
    before = outcome(f"{begin.root}/{scenario.written}")
    scenario.change(begin)
    faults = Faults(remote="://" in root)
    with copied(begin, f"{root}/undisturbed") as place:
        with faults_on(faults):
            scenario.command(place)
        after = outcome(f"{place.root}/{scenario.written}")
        assert_whole(f"{place.root}/{scenario.written}")
    return Undisturbed(begin, faults.seen, before, after, scenario.atomic)


def outcome(url: str) -> Outcome | None:
    try:
        return Outcome.of(url)
    except LatentmillError:
        return None


def trials(operations: list[tuple[str, str]]) -> Iterator[Trial]:
    """Every operation with every way in which it can go wrong.

    A local read that is not made again, by a worker's next attempt either, has one way only.
    """
    for number, operation in enumerate(operations):
        verb = operation[0]
        once = verb in READS and verb != "open" and operation not in operations[number + 1 :]
        for mode in WRITE_MODES if is_write(verb) else READ_MODES:
            if not (mode == "torn" and verb in WHOLE) and not (mode == "permanent" and once):
                yield number, mode


def run_trial(
    scenario: Scenario,
    was: Undisturbed,
    root: str,
    faults: Sequence[Trial],
    seen: set[tuple[str | bool, ...]],
) -> None:
    """Run a command with a fault, look, run it again (with the next fault), compare.

    Args:
        scenario: The command.
        was: What it does undisturbed.
        root: Where it is run.
        faults: What happens in its first run, and in the ones that follow.
        seen: What faults have left so far. Many leave the same files, from where all that follows
            is the same too, and is not looked at twice.
    """
    remote = "://" in root
    left: list[str | bool] = []
    with copied(was.begin, root) as place:
        url = f"{place.root}/{scenario.written}"
        reader = None if was.before is None else open_store(url, device="cpu")
        for number, mode in faults:
            with faults_on(Faults(mode, number, remote=remote)):
                try:
                    scenario.command(place)
                    completed = True
                except (Killed, KeyboardInterrupt, LatentmillError):
                    completed = False
            left += [completed, state_of(place)]
            if tuple(left) in seen:
                continue
            scenario.check(place, completed)
            look(reader, was)
            look_afresh(url, was)
            if completed:
                assert outcome(url) == was.after, "a run that reports success has done its work"
        if tuple(left) in seen:
            return
        with faults_on(Faults(remote=remote)):
            scenario.command(place)
        scenario.check(place, True)
        look(reader, was)
        assert outcome(url) == was.after
        assert_whole(url)
    seen.add(tuple(left))


def look(reader: LatentStore | None, was: Undisturbed) -> None:
    """Whoever has opened the store before reads what was there, or what is there now."""
    if reader is not None and was.before is not None:
        check_records(contents(reader), was)
        assert len(reader) >= len(was.before.records)


def look_afresh(url: str, was: Undisturbed) -> None:
    """Whoever opens the store now finds all that was there before."""
    try:
        reader = open_store(url, device="cpu")
        found = contents(reader)
    except LatentmillError:
        if was.before is not None:
            raise
        return
    check_records(found, was)


def check_records(found: dict[str, Content], was: Undisturbed) -> None:
    states = [state.records for state in (was.before, was.after) if state is not None]
    for key, content in found.items():
        assert content in [state[key] for state in states if key in state], key
    if was.before is not None:
        assert found.keys() >= was.before.records.keys()
    if was.atomic:
        assert found in states


def report(
    name: str,
    scenario: Scenario,
    was: Undisturbed,
    root: str,
    todo: Sequence[tuple[Trial, ...]],
) -> None:
    """Make all trials, print how many they are, and fail with a line for each that failed."""
    failures, seen = [], set[tuple[str | bool, ...]]()
    for faults in todo:
        try:
            run_trial(scenario, was, f"{root}/trial", faults, seen)
        except Exception as error:  # noqa: BLE001  all are reported together
            what = " and ".join(
                f"{mode} at {number} ({' '.join(was.operations[number])})"
                for number, mode in faults
            )
            failures.append(f"{what}: {type(error).__name__}: {error}"[:600])
    writes = sum(is_write(verb) for verb, _ in was.operations)
    print(
        f"| {name} | {len(was.operations)} | {writes} | {len(todo)} | {len(failures)} |", flush=True
    )
    assert not failures, "\n".join(failures[:20])


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """A local folder, in memory where there is such a file system: many small files are made."""
    memory = Path("/dev/shm")
    if not os.access(memory, os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir=memory) as made:
        yield Path(made)


# What they write is written in the same way by another one.
SLOW = ("add again", "export again", "retry-changed after refresh", "sync again")


@pytest.mark.filterwarnings("ignore:.* is not complete")
@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in SCENARIOS],
)
@pytest.mark.parametrize("ways", ["one way", pytest.param("all ways", marks=pytest.mark.slow)])
def test_a_fault_at_every_operation(name: str, ways: str, folder: Path) -> None:
    """Without the slow tests, each operation goes wrong in one way, which a seed draws."""
    scenario = SCENARIOS[name]
    was = undisturbed(scenario, str(folder), folder / "source")
    every = list(trials(was.operations))
    if ways == "one way":
        random.Random(name).shuffle(every)
        every = sorted(dict(every).items())
    report(name, scenario, was, str(folder), [(trial,) for trial in every])


@pytest.mark.filterwarnings("ignore:.* is not complete")
@pytest.mark.parametrize("name", SCENARIOS)
def test_every_command_on_object_storage(name: str, tmp_path: Path) -> None:
    """Without a fault; of the backends that are not S3, none of which compares versions."""
    was = undisturbed(SCENARIOS[name], f"memory://{uuid.uuid4().hex}", tmp_path / "source")
    assert was.after is not None


S3_TRIALS = 20


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.* is not complete")
@pytest.mark.parametrize("name", SCENARIOS)
@pytest.mark.parametrize("backend", ["memory", "s3"])
def test_a_fault_at_every_request_to_a_bucket(
    name: str, backend: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """All of them against fsspec's file system in memory, a sample against a server of S3."""
    root = f"memory://{uuid.uuid4().hex}"
    if backend == "s3":
        root = request.getfixturevalue("s3_bucket")
    scenario = SCENARIOS[name]
    was = undisturbed(scenario, root, tmp_path / "source")
    every = [(trial,) for trial in trials(was.operations)]
    if backend == "s3" and len(every) > S3_TRIALS:
        every = random.Random(name).sample(every, S3_TRIALS)
    report(name, scenario, was, root, every)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.* is not complete")
@pytest.mark.parametrize("name", SCENARIOS)
def test_pairs_of_faults(name: str, folder: Path) -> None:
    """A second fault strikes the run that repairs what the first one left; drawn by a seed."""
    scenario = SCENARIOS[name]
    was = undisturbed(scenario, str(folder), folder / "source")
    every = list(trials(was.operations))
    rng = random.Random(name)
    pairs = [(rng.choice(every), rng.choice(every)) for _ in range(100)]
    report(name, scenario, was, str(folder), pairs)


def test_uploads_that_a_killed_process_left_open_are_aborted(
    tmp_path: Path, s3_bucket: str
) -> None:
    scenario = SCENARIOS["seal"]
    was = undisturbed(scenario, s3_bucket, tmp_path / "source")
    fs = fsspec.filesystem("s3")
    bucket = s3_bucket.removeprefix("s3://")
    field = "begin/store/fields/second/shards/000000.parquet"  # an `add` may be running
    others = ["begin/store/evaluation/vectors.0123456789abcdef.npy", field]
    others += ["begin/storehouse/other", "other"]
    for key in ("begin/store/shards/000000.r1.parquet", *others):
        fs.call_s3("create_multipart_upload", Bucket=bucket, Key=key)
    with faults_on(Faults(remote=True)):
        scenario.command(was.begin)
    assert open_uploads(s3_bucket) == others
    tidy(Storage(f"{s3_bucket}/begin/store/fields/second"))  # as the next `add` does
    assert open_uploads(s3_bucket) == [key for key in others if key != field]


def test_a_store_at_the_root_of_a_bucket_aborts_only_its_own_uploads(s3_bucket: str) -> None:
    own = ["annotations/0001.parquet", "index.0a.arrow", "metadata.0a.parquet"]
    own += ["plan/items-0001.2.parquet", "shards/000000.r1.tar", "shards/000001.parquet"]
    others = ["backup.tar", "fields/second/shards/000000.parquet", "models/shards/000000.parquet"]
    others += ["plan/notes.txt", "shards/part-1.parquet"]
    for key in own + others:
        fsspec.filesystem("s3").call_s3(
            "create_multipart_upload", Bucket=s3_bucket.removeprefix("s3://"), Key=key
        )
    abort_uploads(Storage(s3_bucket))
    assert open_uploads(s3_bucket) == others


def test_uploads_on_all_pages_of_the_list_are_aborted(
    s3_bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """S3 lists 1,000 uploads a page; here it is two."""
    fs = fsspec.filesystem("s3")
    for unit in range(5):
        key = f"shards/00000{unit}.tar"
        fs.call_s3("create_multipart_upload", Bucket=s3_bucket.removeprefix("s3://"), Key=key)
    plain = type(fs).call_s3

    def in_pages(self: Any, method: str, *args: Any, **kwargs: Any) -> Any:
        found = plain(self, method, *args, **kwargs)
        if method != "list_multipart_uploads":
            return found
        after = (kwargs.get("KeyMarker", ""), kwargs.get("UploadIdMarker", ""))
        left = [one for one in found["Uploads"] if (one["Key"], one["UploadId"]) > after]
        found |= {"Uploads": left[:2], "IsTruncated": len(left) > 2}
        last = found["Uploads"][-1]
        return found | {"NextKeyMarker": last["Key"], "NextUploadIdMarker": last["UploadId"]}

    with monkeypatch.context() as patch:
        patch.setattr(type(fs), "call_s3", in_pages)
        abort_uploads(Storage(s3_bucket))
    assert open_uploads(s3_bucket) == []
