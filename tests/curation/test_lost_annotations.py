"""Stores of which a file of annotations is missing: the newest one, or earlier ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import latentmill as lm
from latentmill.errors import StoreError
from latentmill.store.store import LatentStore
from support import runs
from support.in_process import encode, tone

pytestmark = pytest.mark.usefixtures("inline")


@pytest.fixture
def songs(tmp_path: Path) -> Path:
    for number in range(3):
        tone(tmp_path / f"songs/{number}.wav", 2000 + 500 * number)
        sidecar(tmp_path / "songs", number, number)
    return tmp_path / "songs"


def sidecar(songs: Path, number: int, bpm: int) -> None:
    (songs / f"{number}.json").write_text(json.dumps({"bpm": bpm}))


def annotate(store: Path, **moods: str) -> None:
    lines = ["key,mood", *(f"{key.removeprefix('_')},{mood}" for key, mood in moods.items())]
    (store.parent / "rows.csv").write_text("\n".join(lines))
    lm.annotate(store, store.parent / "rows.csv")


def annotated_twice(songs: Path, tmp_path: Path) -> Path:
    encode(songs, tmp_path / "store")
    annotate(tmp_path / "store", _0="calm")
    annotate(tmp_path / "store", _0="loud")
    return tmp_path / "store"


def metadata(store: Path) -> dict[str, dict[str, Any]]:
    return {record.key: dict(record.metadata) for record in LatentStore(store)}


def test_a_run_fails_before_it_encodes_and_a_revert_lets_it_go_on(
    songs: Path, tmp_path: Path
) -> None:
    store = annotated_twice(songs, tmp_path)
    (store / "annotations/0002.parquet").unlink()
    tone(songs / "9.wav", 3000)
    before = runs.commits(store)
    for extend in (True, False):
        with pytest.raises(StoreError, match=r"0002\.parquet is missing or damaged: .* --revert"):
            encode(songs, store, extend=extend)
        assert runs.commits(store) == before
    assert not LatentStore(store).complete
    assert lm.revert_annotations(store, 1).version == 3
    assert metadata(store)["0"] == {"bpm": 0, "mood": "calm"}
    assert encode(songs, store).info.encoded == 4
    assert metadata(store) == {
        "0": {"bpm": 0, "mood": "calm"},
        "1": {"bpm": 1},
        "2": {"bpm": 2},
        "9": {},
    }
    runs.assert_whole(store)


def test_a_revert_to_the_values_of_the_lost_file(songs: Path, tmp_path: Path) -> None:
    store = annotated_twice(songs, tmp_path)
    assert lm.revert_annotations(store).version == 3  # the values of version 1
    (store / "annotations/0003.parquet").unlink()
    assert lm.revert_annotations(store, 1).version == 4
    assert metadata(store)["0"] == {"bpm": 0, "mood": "calm"}
    assert not lm.revert_annotations(store, 1).changed
    runs.assert_whole(store)


def test_a_store_that_was_never_complete_is_not_reverted(songs: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    encode(songs, store)
    annotate(store, _0="calm")
    (store / "dataset.json").unlink()
    with pytest.raises(StoreError, match="is not complete: finish the run"):
        lm.revert_annotations(store)


def test_earlier_versions_may_be_deleted_after_a_refresh(songs: Path, tmp_path: Path) -> None:
    """Nobody knows then who has set a value, so it stays when the source changes."""
    store = tmp_path / "store"
    encode(songs, store)
    sidecar(songs, 0, 77)
    refresh = {"extend": True, "refresh_metadata": True}
    encode(songs, store, **refresh)
    annotate(store, _0="calm")
    sidecar(songs, 1, 88)
    encode(songs, store, **refresh)
    (store / "annotations/0001.parquet").unlink()
    tone(songs / "9.wav", 3000)
    assert encode(songs, store, extend=True).info.encoded == 4
    expected: dict[str, Any] = {
        "0": {"bpm": 77, "mood": "calm"},
        "1": {"bpm": 88},
        "2": {"bpm": 2},
        "9": {},
    }
    assert metadata(store) == expected
    sidecar(songs, 0, 100)
    sidecar(songs, 1, 100)  # set by version 3, whose files are there
    summary = encode(songs, store, **refresh).refreshed
    assert summary is not None
    assert (summary.values, summary.kept) == (1, 1)
    expected["1"] = {"bpm": 100}
    assert metadata(store) == expected
    runs.assert_whole(store)


def test_a_view_is_written_again_without_its_earlier_versions(songs: Path, tmp_path: Path) -> None:
    store, view = tmp_path / "store", tmp_path / "view"
    encode(songs, store)
    annotate(store, _0="calm")
    lm.select(store, view)
    annotate(view, _1="dark")
    annotate(store, _0="loud")
    (view / "annotations/0001.parquet").unlink()
    lm.select(store, view, overwrite=True)
    assert [one.get("mood") for one in metadata(view).values()] == ["loud", "dark", None]


def test_a_seal_without_dataset_json_needs_the_newest_version_only(
    songs: Path, tmp_path: Path
) -> None:
    store = annotated_twice(songs, tmp_path)
    expected, entry = metadata(store), LatentStore(store).info.annotation
    (store / "annotations/0001.parquet").unlink()
    (store / "dataset.json").unlink()
    encode(songs, store)
    now = LatentStore(store).info.annotation
    assert entry is not None
    assert now is not None
    assert metadata(store) == expected
    assert (now.version, now.hashes, now.names) == (2, ["", entry.hashes[1]], ["mood"])
    with pytest.raises(StoreError, match=r"0001\.parquet is missing"):
        lm.revert_annotations(store, 1)
