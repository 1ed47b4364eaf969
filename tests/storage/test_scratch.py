"""The folder of temporary files, which threads and processes create and remove at the same time."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from latentmill.storage import scratch


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


@pytest.mark.parametrize("kind", ["file", "dangling link"])
def test_what_is_in_the_way_is_an_error(kind: str, tmp_path: Path) -> None:
    if kind == "file":
        (tmp_path / "tmp").touch()
    else:
        (tmp_path / "tmp").symlink_to("nowhere")
    with pytest.raises(FileExistsError):
        write(tmp_path / "tmp")
