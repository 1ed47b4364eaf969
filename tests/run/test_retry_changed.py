"""Planning of changed files with `--extend --retry-changed`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import soundfile

from latentmill.config import load_config
from latentmill.plan import items as plan_items
from latentmill.plan import load
from latentmill.run import prepare as planning
from latentmill.run.forecast import forecast
from latentmill.sources.base import Item
from latentmill.storage.storage import Storage
from support import runs


@pytest.fixture
def songs(tmp_path: Path) -> Path:
    return runs.write_songs(tmp_path / "songs", 5)


@pytest.fixture
def options(songs: Path, tmp_path: Path) -> dict[str, object]:
    """Options that plan the changed files of a store again."""
    options: dict[str, object] = {"source": str(songs), "out": str(tmp_path / "store")}
    options |= {"device": "cpu", "unit_seconds": 3.0}
    forecast(load_config(None, options), calibrated=False)
    return options | {"extend": True, "retry_changed": True}


def test_of_changed_files_the_headers_are_read_some_at_a_time(
    songs: Path, options: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    for number, path in enumerate(sorted(songs.rglob("*.wav"))):
        soundfile.write(path, np.zeros(8000 * (number + 1), np.float32), 8000)
        os.utime(path, ns=(1, 1))
    sizes: list[int] = []

    def counted(items: Sequence[Item]) -> pa.Table:
        sizes.append(len(items))
        return plan_items.draft_table(items)

    monkeypatch.setattr(planning, "SORT_ITEMS", 2)
    monkeypatch.setattr(planning, "draft_table", counted)
    value = forecast(load_config(None, options | {"probe": True}), calibrated=False)
    assert sizes == [2, 2, 1]
    assert (value.hours * 3600, value.estimated_items) == (1 + 2 + 3 + 4 + 5, 0)


def test_ignored_files_are_counted_again_when_only_files_have_changed(
    songs: Path, options: dict[str, object]
) -> None:
    (songs / "cover.jpg").write_bytes(b"")
    os.utime(songs / "album 1" / "song 01.wav", ns=(1, 1))
    assert forecast(load_config(None, options), calibrated=False).ignored == {".jpg": 1}
    plan = load(Storage(str(options["out"])))
    assert plan is not None
    assert plan.ignored == {".jpg": 1}
