"""Whole runs between buckets whose server stumbles, or refuses what is written."""

from __future__ import annotations

from pathlib import Path

import fsspec
import pytest

from latentmill.storage.storage import Storage
from latentmill.store.store import open_store
from latentmill.store.verify import verify
from support import runs
from support.faulty_s3 import Faults
from support.storage_faults import faulty_s3


def upload(folder: Path, url: str) -> None:
    filesystem, root = fsspec.core.url_to_fs(url)
    for path in folder.rglob("*.wav"):
        filesystem.pipe_file(f"{root}/{path.relative_to(folder)}", path.read_bytes())


def arguments(bucket: str) -> list[str]:
    options = "--unit-seconds 2 --device cpu --workers 1 --threads 1"
    return ["encode", f"{bucket}/songs", f"{bucket}/store", *options.split()]


def test_a_run_with_errors_and_cut_connections_is_complete(
    s3_bucket: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], inline: None
) -> None:
    upload(runs.write_songs(tmp_path / "songs", 6), f"{s3_bucket}/songs")
    with faulty_s3(Faults(errors=0.05, cuts=0.01, seed=7)) as faults:
        result = runs.call(capsys, *arguments(s3_bucket))
    check_run(s3_bucket, result, faults, 6)


@pytest.mark.slow
@pytest.mark.parametrize("count", [6, 200])
def test_a_run_in_processes_with_errors_and_cut_connections_is_complete(
    s3_bucket: str, tmp_path: Path, count: int
) -> None:
    upload(runs.write_songs(tmp_path / "songs", count), f"{s3_bucket}/songs")
    with faulty_s3(Faults(errors=0.05, cuts=0.01, seed=7)) as faults:
        result = runs.command(*arguments(s3_bucket))
    check_run(s3_bucket, result, faults, count)


def check_run(s3_bucket: str, result: runs.Result, faults: Faults, count: int) -> None:
    assert result.code == 0, result.err
    assert faults.seen["error"] > 0
    store = open_store(f"{s3_bucket}/store")
    report = verify(store)
    assert report.faults == []
    assert len(store) == count


@pytest.mark.slow
def test_refused_output_stops_the_run_and_loses_nothing(s3_bucket: str, tmp_path: Path) -> None:
    upload(runs.write_songs(tmp_path / "songs", 5), f"{s3_bucket}/songs")
    written: list[str] = []

    def after_two_commits(method: str, path: str) -> bool:
        if method != "PUT" or "/store/" not in path:
            return False
        refused = len(written) >= 2
        if "/commits/" in path and not refused:
            written.append(path)
        return refused

    with faulty_s3(Faults(deny=after_two_commits)):
        result = runs.command(*arguments(s3_bucket))
    assert result.code == 6, result.err
    assert result.out == ""
    sentence = result.err.splitlines()[-1]
    assert sentence.startswith(f"latentmill: Cannot write {s3_bucket}/store/")
    storage = Storage(f"{s3_bucket}/store")
    names = storage.list("commits")
    assert len(names) == 2
    kept = {name: storage.read(f"commits/{name}") for name in names}
    result = runs.command(*arguments(s3_bucket))
    assert result.code == 0, result.err
    assert kept == {name: storage.read(f"commits/{name}") for name in names}
    assert verify(open_store(storage.root)).faults == []
