"""Storage: whole writes or none, on a disk, in memory and on S3."""

from __future__ import annotations

import contextlib
import errno
import os
import pickle
import stat
import tempfile
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from latentmill.errors import StorageError, StoreError
from latentmill.storage import remote, uploads
from latentmill.storage import storage as module
from latentmill.storage.storage import Storage


@pytest.fixture(params=["local", "memory", "s3"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    if request.param == "local":
        return Storage(str(tmp_path / "out ü"))
    if request.param == "memory":
        return Storage(f"memory://{uuid.uuid4().hex}/out")
    return Storage(request.getfixturevalue("s3_bucket") + "/deep/out ü")


def files_below(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


def test_the_few_things_a_store_needs(storage: Storage) -> None:
    assert storage.list("shards") == {}
    assert not storage.exists("shards/a.bin")
    assert storage.read_if_exists("shards/a.bin") is None
    storage.write("shards/a.bin", b"0123456789")
    storage.write("shards/deep/b.bin", b"b")
    storage.write("shards/empty", b"")
    assert storage.exists("shards/a.bin")
    assert storage.list("shards") == {"a.bin": 10, "empty": 0}  # not what lies deeper
    assert storage.read("shards/a.bin") == b"0123456789"
    assert storage.read_if_exists("shards/empty") == b""
    with storage.open("shards/a.bin") as file:
        file.seek(4)
        assert file.read(3) == b"456"
    storage.write("shards/a.bin", b"new")
    assert storage.read("shards/a.bin") == b"new"
    for _ in range(2):
        storage.delete("shards/a.bin")
        assert not storage.exists("shards/a.bin")
    assert storage.list("shards") == {"empty": 0}


@pytest.mark.parametrize(
    ("offset", "length", "wanted"), [(0, 10, b"0123456789"), (3, 4, b"3456"), (9, 1, b"9")]
)
def test_ranges(storage: Storage, offset: int, length: int, wanted: bytes) -> None:
    storage.write("a", b"0123456789")
    assert storage.read_range("a", offset, length) == wanted
    assert storage.read_range("a", offset, 0) == b""
    assert storage.read_range("a", 8, 100) == b"89"


def test_what_another_process_writes_is_seen(storage: Storage) -> None:
    storage.write("a", b"1")
    assert storage.list("") == {"a": 1}
    other = pickle.loads(pickle.dumps(storage))
    if storage.root.startswith("s3://"):  # s3fs keeps listings: write past it
        import boto3

        bucket, _, key = storage.full("b").partition("/")
        boto3.client("s3").put_object(Bucket=bucket, Key=key, Body=b"22")
    else:
        other.write("b", b"22")
    assert storage.exists("b")
    assert storage.list("") == {"a": 1, "b": 2}


def test_publishing_a_finished_file(storage: Storage) -> None:
    with storage.scratch_file("shards/000.parquet") as temporary:
        temporary.write_bytes(b"rows")
        assert storage.list("shards") == {}
        storage.publish(temporary, "shards/000.parquet")
    assert storage.read("shards/000.parquet") == b"rows"
    assert not temporary.exists()
    assert storage.list("shards") == {"000.parquet": 4}


@pytest.mark.parametrize("size", [0, 12 << 20])
def test_bytes_of_an_upload_are_reported(
    storage: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    """A worker that reports no progress is replaced, and an upload may take hours."""
    monkeypatch.setattr(uploads, "ONE_REQUEST", 10 << 20)
    reports: list[int] = []
    finished = tmp_path / "finished"
    finished.write_bytes(os.urandom(size))
    data = finished.read_bytes()
    assert storage.publish(finished, "shards/a", lambda: reports.append(1))
    assert storage.read("shards/a") == data
    if not storage.local and size:
        assert len(reports) == 3


def test_a_scratch_file_goes_when_its_writer_fails(storage: Storage) -> None:
    with pytest.raises(ZeroDivisionError), storage.scratch_file("shards/a") as temporary:
        temporary.write_bytes(b"half")
        raise ZeroDivisionError
    assert not temporary.exists()
    assert storage.list("shards") == {}


def test_scratch_that_a_killed_run_left_is_cleared(storage: Storage) -> None:
    storage.write("shards/a", b"kept")
    storage.scratch_folder.mkdir(parents=True, exist_ok=True)
    left = storage.scratch_folder / f"{uuid.uuid4().hex}.shards.a"
    left.write_bytes(b"half")
    storage.clear_scratch()
    assert not storage.scratch_folder.exists()
    storage.clear_scratch()
    assert storage.read("shards/a") == b"kept"


def test_temporary_files_for_a_bucket_are_those_of_one_user(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    one_sentence: Callable[[BaseException], str],
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    storage = Storage(f"memory://{uuid.uuid4().hex}/out")
    storage.scratch_folder.touch()  # as a folder of another user, it cannot be written to
    with pytest.raises(StorageError) as caught, storage.scratch_file("shards/a"):
        pass
    where, _, rest = one_sentence(caught.value).partition(": ")
    assert where == f"Cannot write {storage.scratch_folder}"
    assert "set TMPDIR to a folder that you can write to" in rest
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    with storage.scratch_file("shards/a") as temporary:
        temporary.write_bytes(b"rows")
        storage.publish(temporary, "shards/a")
    assert storage.read("shards/a") == b"rows"


def test_a_storage_travels_to_workers(storage: Storage) -> None:
    storage.write("a", b"1")
    copy = pickle.loads(pickle.dumps(storage))
    assert (copy.root, copy.local) == (storage.root, storage.local)
    assert copy.read("a") == b"1"


def test_a_missing_file_is_named(
    storage: Storage, one_sentence: Callable[[BaseException], str]
) -> None:
    for read in (
        lambda: storage.read("shards/none"),
        lambda: storage.read_range("shards/none", 0, 5),
        lambda: contextlib.ExitStack().enter_context(storage.open("shards/none")),
    ):
        with pytest.raises(StorageError) as caught:
            read()
        where, _, cause = one_sentence(caught.value).rpartition(": ")
        assert where == f"Cannot read {storage.root}/shards/none"
        assert cause.lower().startswith("no such file") or cause.endswith("key does not exist.")


@contextlib.contextmanager
def full_disk(patch: pytest.MonkeyPatch, *, folders: bool = False) -> Iterator[None]:
    real = os.fsync

    def fsync(file: int) -> None:
        if stat.S_ISDIR(os.fstat(file).st_mode) == folders:
            raise OSError(errno.EINVAL if folders else errno.ENOSPC, "No space left on device")
        real(file)

    with patch.context() as inner:
        inner.setattr(os, "fsync", fsync)
        yield


def test_a_write_that_fails_leaves_nothing(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    one_sentence: Callable[[BaseException], str],
) -> None:
    storage = Storage(str(tmp_path))
    storage.write("plan/old", b"old")
    for path in ("plan/new", "plan/old"):
        with full_disk(monkeypatch), pytest.raises(StorageError) as caught:
            storage.write(path, b"new" * 1000)
        assert f"{tmp_path}/{path}: No space left" in one_sentence(caught.value)
    with storage.scratch_file("shards/a") as temporary:
        temporary.write_bytes(b"rows")
        with full_disk(monkeypatch), pytest.raises(StorageError):
            storage.publish(temporary, "shards/a")
    assert files_below(tmp_path) == ["plan/old"]
    assert storage.read("plan/old") == b"old"


def test_a_file_system_without_fsync_of_folders_will_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = Storage(str(tmp_path))
    with full_disk(monkeypatch, folders=True):
        storage.write("a", b"1")
    assert storage.read("a") == b"1"


def test_finished_files_have_the_rights_of_any_new_file(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    before = os.umask(0o027)
    try:
        storage.write("a", b"1")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o640


def test_a_store_below_a_file_is_refused(
    tmp_path: Path, one_sentence: Callable[[BaseException], str]
) -> None:
    (tmp_path / "file").write_bytes(b"")
    storage = Storage(str(tmp_path / "file/out"))
    for attempt in (lambda: storage.write("a", b"1"), lambda: storage.read("a")):
        with pytest.raises(StorageError) as caught:
            attempt()
        assert "Not a directory" in one_sentence(caught.value)


def test_a_bucket_that_is_not_there_is_refused(
    s3_bucket: str, one_sentence: Callable[[BaseException], str]
) -> None:
    storage = Storage(f"{s3_bucket}-other/out")
    assert storage.list("shards") == {}
    with pytest.raises(StorageError) as caught:
        storage.write("a", b"1")
    assert "bucket does not exist" in one_sentence(caught.value)


def test_errors_of_a_storage_client_are_storage_errors(
    s3_bucket: str, monkeypatch: pytest.MonkeyPatch, one_sentence: Callable[[BaseException], str]
) -> None:
    from botocore.exceptions import EndpointConnectionError

    storage = Storage(f"{s3_bucket}/out")

    def refuse(*_: object, **__: object) -> None:
        raise EndpointConnectionError(endpoint_url="http://127.0.0.1:1")

    monkeypatch.setattr(remote, "FIRST_PAUSE", 0.001)
    monkeypatch.setattr(storage._fs, "pipe_file", refuse)
    with pytest.raises(StorageError) as caught:
        storage.write("a", b"1")
    assert "Could not connect" in one_sentence(caught.value)


def test_an_address_that_no_package_knows_is_refused(
    one_sentence: Callable[[BaseException], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(StoreError) as caught:
        Storage("nonsense://a/b")
    assert "nonsense" in one_sentence(caught.value)

    def missing(url: str, **options: object) -> None:
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(module.fsspec.core, "url_to_fs", missing)
    with pytest.raises(StoreError, match=r"pip install 'latentmill\[s3\]'\.$"):
        Storage("s3://bucket/out")
