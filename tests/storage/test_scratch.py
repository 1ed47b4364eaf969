"""The folder of temporary files, which threads and processes create and remove at the same time."""

from __future__ import annotations

import errno
import fcntl
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from latentmill.engine.lock import Membership, only_run
from latentmill.errors import StorageError, StoreError
from latentmill.storage import scratch
from latentmill.storage.storage import Storage
from support import file_locks

OWN = f"{'0f' * 16}.shards.000000.parquet"  # as `temporary_file` names its files


def write(folder: Path) -> None:
    with scratch.temporary_file(folder, "x") as temporary:
        temporary.write_bytes(b"x")


def test_a_folder_that_another_thread_removes_is_created_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It exists when `mkdir` is called, and is gone when `mkdir` checks that it is a folder."""
    real, calls = os.mkdir, []

    def mkdir(path: Any, *rest: Any) -> None:
        calls.append(path)
        if len(calls) == 1:
            raise FileExistsError
        real(path, *rest)

    monkeypatch.setattr(os, "mkdir", mkdir)
    write(tmp_path / "tmp")
    assert len(calls) == 2
    assert not (tmp_path / "tmp").exists()


def test_threads_share_the_folder(tmp_path: Path) -> None:
    with ThreadPoolExecutor(4) as pool:
        for done in [pool.submit(write, tmp_path / "tmp") for _ in range(2000)]:
            done.result()
    assert not (tmp_path / "tmp").exists()


def test_a_file_in_the_way_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "tmp").touch()
    with pytest.raises(FileExistsError):
        write(tmp_path / "tmp")


@pytest.mark.parametrize("target", ["home", "nowhere"])
def test_a_link_is_refused(
    target: str, tmp_path: Path, one_sentence: Callable[[BaseException], str]
) -> None:
    (tmp_path / "home/letters").mkdir(parents=True)
    (tmp_path / "home" / OWN).touch()
    (tmp_path / "tmp").symlink_to(target)
    for use in (write, scratch.clear):
        with pytest.raises(StoreError, match="tmp is a link: remove it") as caught:
            use(tmp_path / "tmp")
        one_sentence(caught.value)
    assert {path.name for path in (tmp_path / "home").iterdir()} == {OWN, "letters"}
    assert scratch.entries(tmp_path) == {"home", "tmp"}


def test_only_temporary_files_are_removed(tmp_path: Path) -> None:
    mine = tmp_path / "mine.txt"
    mine.write_text("mine")
    for name in ("thesis.txt", "0f.parquet", "0F" * 16 + ".x", "letters/a.txt", f"{OWN}.d/b.txt"):
        (tmp_path / "tmp" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "tmp" / name).write_text("mine")
    (tmp_path / "tmp" / f"{'0e' * 16}.x").symlink_to(mine)
    (tmp_path / "tmp" / f"{'0d' * 16}.x").symlink_to(tmp_path / "tmp/letters")
    before = sorted((tmp_path / "tmp").rglob("*"))
    (tmp_path / "tmp" / OWN).write_bytes(b"half")
    scratch.clear(tmp_path / "tmp")
    assert sorted((tmp_path / "tmp").rglob("*")) == before
    assert scratch.entries(tmp_path) == {"mine.txt", "tmp"}


def test_a_file_that_is_being_written_is_kept(tmp_path: Path) -> None:
    with scratch.temporary_file(tmp_path / "tmp", "x") as temporary:
        scratch.clear(tmp_path / "tmp")
        assert temporary.exists()
        assert scratch.entries(tmp_path) == set()


def test_on_nfs_a_file_that_is_being_written_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file_locks.as_on_nfs(monkeypatch)
    with scratch.temporary_file(tmp_path / "tmp", "x") as temporary:
        (tmp_path / "tmp" / OWN).touch()
        scratch.clear(tmp_path / "tmp")
        assert temporary.exists()
        assert not (tmp_path / "tmp" / OWN).exists()
    assert not (tmp_path / "tmp").exists()


def test_smb_lets_others_write_to_a_temporary_file(tmp_path: Path) -> None:
    """There, only the descriptor that has the lock can write: no other one may have it."""
    with scratch.temporary_file(tmp_path / "tmp", "x") as temporary, temporary.open("r+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_a_file_that_an_earlier_version_is_writing_is_kept(tmp_path: Path) -> None:
    """It locks the temporary file itself."""
    (tmp_path / "tmp").mkdir()
    with (tmp_path / "tmp" / OWN).open("xb") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        scratch.clear(tmp_path / "tmp")
        assert (tmp_path / "tmp" / OWN).exists()
    scratch.clear(tmp_path / "tmp")
    assert not (tmp_path / "tmp").exists()


def test_what_a_killed_process_has_left_is_removed_while_others_write(tmp_path: Path) -> None:
    code = (
        "import sys, pathlib; from latentmill.storage import scratch\n"
        "with scratch.temporary_file(pathlib.Path(sys.argv[1]), 'x') as temporary:\n"
        "    print(temporary, flush=True); sys.stdin.read()"
    )
    folder, pipe = tmp_path / "tmp", subprocess.PIPE
    command = [sys.executable, "-c", code, str(folder)]
    with (
        subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as process,
        scratch.temporary_file(folder, "y") as own,
    ):
        assert process.stdout is not None
        left = Path(process.stdout.readline().strip())
        scratch.clear(folder)
        assert left.exists()
        process.kill()
        process.wait()
        assert left.exists()
        scratch.clear(folder)
        assert {path.name[:32] for path in folder.iterdir()} == {own.name[:32]}
        assert own.exists()
    assert not folder.exists()


def test_a_folder_that_vanishes_while_it_is_cleared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Path.iterdir

    def iterdir(path: Path) -> Iterator[Path]:
        if path.name == "tmp":
            path.rmdir()  # by another process, whose last temporary file is finished
        return real(path)

    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(Path, "iterdir", iterdir)
    scratch.clear(tmp_path / "tmp")


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_without_locks_nothing_is_removed(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file_locks.that_fail(monkeypatch, code)
    with scratch.temporary_file(tmp_path / "tmp", "x") as temporary:
        scratch.clear(tmp_path / "tmp")
        assert temporary.exists()
    assert not (tmp_path / "tmp").exists()


def test_another_error_of_a_lock_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file_locks.that_fail(monkeypatch, errno.EIO)
    storage = Storage(str(tmp_path))
    with pytest.raises(StorageError, match=r"Cannot write .*/a: Input/output error"):
        storage.write("a", b"1")
    with pytest.raises(StorageError, match=r"\.lock: Input/output error"), only_run(storage):
        pass
    with pytest.raises(StorageError, match=r"\.lock: Input/output error"):
        Membership(storage)


def test_the_entries_of_a_folder(tmp_path: Path) -> None:
    assert scratch.entries(tmp_path / "none") == set()
    (tmp_path / "tmp").mkdir()
    assert scratch.entries(tmp_path) == set()
    (tmp_path / "tmp" / OWN).touch()
    (tmp_path / "plan").mkdir()
    assert scratch.entries(tmp_path) == {"plan"}
    (tmp_path / "tmp" / f"{OWN}.d").mkdir()
    assert scratch.entries(tmp_path) == {"plan", "tmp"}
