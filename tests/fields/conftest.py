"""A store to which fields are added, without Ray."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from support import runs
from support.in_process import encode, in_process


@pytest.fixture(autouse=True)
def _inline() -> Iterator[None]:
    with in_process():
        yield


@pytest.fixture
def songs(tmp_path: Path) -> Path:
    return runs.write_songs(tmp_path / "songs", 5)


@pytest.fixture
def store(songs: Path, tmp_path: Path) -> Path:
    encode(songs, tmp_path / "store", unit_seconds=3.0)
    return tmp_path / "store"
