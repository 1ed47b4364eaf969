"""Storage that fails: what passes is tried again, what stays is said at once, nothing is torn."""

from __future__ import annotations

import errno
import threading
import time
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from latentmill.errors import ConfigError, StorageError
from latentmill.storage import remote
from latentmill.storage.storage import Storage
from support.faulty_s3 import Faults
from support.storage_faults import faulty_s3


@pytest.fixture(params=["local", "memory", "s3"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    if request.param == "local":
        return Storage(str(tmp_path / "out"))
    if request.param == "memory":
        return Storage(f"memory://{uuid.uuid4().hex}/out")
    return Storage(request.getfixturevalue("s3_bucket") + "/out")


def test_errors_that_pass_are_not_seen(s3_bucket: str, tmp_path: Path) -> None:
    finished = tmp_path / "finished"
    with faulty_s3(Faults(errors=0.2, cuts=0.1, seed=1)) as faults:
        storage = Storage(f"{s3_bucket}/out")
        for number in range(12):
            data = f"{number}".encode() * 1000
            storage.write(f"a/{number}", data)
            assert storage.read(f"a/{number}") == data
            assert storage.read_range(f"a/{number}", 7, 20) == data[7:27]
            finished.write_bytes(data)
            storage.publish(finished, f"b/{number}")
            assert storage.create(f"c/{number}", data)
            assert not storage.create(f"c/{number}", b"other")
            assert storage.exists(f"c/{number}")
            assert not storage.exists(f"c/{number}-none")
            assert storage.read_if_exists(f"c/{number}-none") is None
            storage.delete(f"b/{number}")
        assert len(storage.list("a")) == len(storage.list("c")) == 12
        assert storage.list("b") == {}
        ranges = [(f"a/{number}", 3, 10) for number in range(12)] * 3
        assert (
            storage.read_ranges(ranges)
            == [(f"{number}".encode() * 1000)[3:13] for number in range(12)] * 3
        )
    assert faults.seen["error"] > 20
    assert faults.seen["cut"] > 7


def test_errors_that_stay_are_said_at_once(
    s3_bucket: str, one_sentence: Callable[[BaseException], str]
) -> None:
    Storage(f"{s3_bucket}/out").write("a", b"1")

    def refused(call: Callable[[], object], text: str) -> None:
        before = faults.seen.total()
        with pytest.raises(StorageError) as caught:
            call()
        assert text in one_sentence(caught.value)
        assert faults.seen.total() - before <= 2

    with faulty_s3(Faults()) as faults:
        storage = Storage(f"{s3_bucket}/out")
        refused(lambda: storage.read("none"), "no such file")
        refused(lambda: Storage(f"{s3_bucket}-none/out").write("a", b"1"), "bucket does not exist")
        faults.deny = lambda method, path: True
        for call in (
            lambda: storage.read("a"),
            lambda: storage.read_if_exists("a"),
            lambda: storage.exists("a"),
            lambda: storage.list(""),
            lambda: storage.write("a", b"2"),
            lambda: storage.create("b", b"2"),
            lambda: storage.delete("a"),
        ):
            refused(call, f"{s3_bucket}/out/")
    assert Storage(f"{s3_bucket}/out").list("") == {"a": 1}


def test_an_outage_ends_in_one_sentence(
    s3_bucket: str, one_sentence: Callable[[BaseException], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "GIVE_UP_SECONDS", 0.5)
    with faulty_s3(Faults(errors=1.0)):
        storage = Storage(f"{s3_bucket}/out")
        began = time.monotonic()
        with pytest.raises(StorageError) as caught:
            storage.write("a", b"1")
        assert time.monotonic() - began < 60
    assert one_sentence(caught.value).startswith(f"Cannot write {s3_bucket}/out/a: ")


# Not in memory, where only one process can be: fsspec looks first and writes then.
@pytest.mark.parametrize("storage", ["local", "s3"], indirect=True)
def test_one_of_many_racers_creates_a_file(storage: Storage) -> None:
    storage.write("other", b"")  # the folder is there
    start = threading.Barrier(8)

    def race(number: int) -> bool:
        start.wait()
        return storage.create("commits/000001.json", b"%d" % number)

    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(race, range(8)))
    assert won.count(True) == 1
    assert storage.read("commits/000001.json") == b"%d" % won.index(True)
    assert storage.list("commits") == {"000001.json": 1}


def test_what_was_created_with_a_lost_answer_is_ours(s3_bucket: str) -> None:
    with faulty_s3(Faults(cuts=0.5, seed=3)) as faults:
        storage = Storage(f"{s3_bucket}/out")
        for number in range(30):
            assert storage.create(f"{number}", b"mine")
        assert faults.seen["cut"] > 10


@pytest.mark.parametrize("error", [errno.EPERM, errno.EEXIST])
def test_creating_where_there_are_no_links(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: int
) -> None:
    def no_links(*_: object) -> None:
        raise OSError(error, "no")

    storage = Storage(str(tmp_path))
    storage.write("a", b"1")
    monkeypatch.setattr("os.link", no_links)
    assert not storage.create("a", b"2")
    if error == errno.EPERM:
        assert storage.create("b", b"2")
        assert storage.read("b") == b"2"
    assert storage.read("a") == b"1"


def test_an_upload_that_is_cut_off_leaves_nothing(
    s3_bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import boto3

    finished = tmp_path / "shard"
    finished.write_bytes(bytes(12 << 20))
    monkeypatch.setattr("s3fs.core.calculate_chunksize", lambda *_, **__: 5 << 20)
    client, bucket = boto3.client("s3"), s3_bucket.removeprefix("s3://")
    with faulty_s3(Faults(deny=lambda method, path: "partNumber=3" in path)) as faults:
        storage = Storage(f"{s3_bucket}/out")
        with pytest.raises(StorageError, match=r"^Cannot write s3://[^ ]+/shards/a: "):
            storage.publish(finished, "shards/a")
        assert faults.seen["denied"] == 1
        assert storage.list("shards") == {}
        assert "Uploads" not in client.list_multipart_uploads(Bucket=bucket)
        faults.deny = None
        faults.errors, faults.cuts = 0.1, 0.05
        storage.publish(finished, "shards/a")
    assert Storage(f"{s3_bucket}/out").list("shards") == {"a": 12 << 20}


def test_nothing_is_written_to_the_web(one_sentence: Callable[[BaseException], str]) -> None:
    storage = Storage("https://127.0.0.1:9/store")
    for attempt in (
        storage.refuse_read_only,
        lambda: storage.write("a", b"1"),
        lambda: storage.create("a", b"1"),
        lambda: storage.publish(Path("x"), "a"),
        lambda: storage.delete("a"),
    ):
        with pytest.raises(ConfigError, match="https is read-only") as caught:
            attempt()
        one_sentence(caught.value)
