"""Extending a store without the settings that it was planned with: they keep their values."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

import latentmill as lm
from latentmill.config import load_config
from latentmill.errors import SourceError, StoreError
from latentmill.plan import Plan, load, read_items
from latentmill.run.forecast import Forecast, forecast
from latentmill.storage.storage import Storage
from support import runs

ROLE = "(?P<group>.*)/(?P<role>[^/]+)$"
STEMS = {"include": ["*/vocals.*", "*/drums.*"], "exclude": ["two/*"], "group_by": ROLE}


def write(*paths: Path, seconds: float = 1.0) -> None:
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(path, np.zeros(round(seconds * 8000), np.int16), 8000)


def plan(source: Path, store: Path, **options: Any) -> Forecast:
    given = {"source": str(source), "out": str(store), "device": "cpu", **options}
    return forecast(load_config(None, given), calibrated=False)


def planned(store: Path) -> Plan:
    found = load(Storage(str(store)))
    assert found is not None
    return found


def stems(store: Path) -> dict[str, tuple[str | None, str | None]]:
    """Group and role of every planned item."""
    storage = Storage(str(store))
    items = (one for unit in planned(store).units for one in read_items(storage, unit))
    return {one.key: (one.group, one.role) for one in items}


@pytest.fixture
def songs(tmp_path: Path) -> Path:
    names = [f"{song}/{stem}.wav" for song in ("one", "two") for stem in ("vocals", "drums", "mix")]
    write(*(tmp_path / "songs" / name for name in names))
    return tmp_path / "songs"


@pytest.fixture
def store(songs: Path, tmp_path: Path) -> Path:
    plan(songs, tmp_path / "store", **STEMS)
    assert stems(tmp_path / "store").keys() == {"one/vocals", "one/drums"}
    return tmp_path / "store"


def by_plan(songs: Path, store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    del capsys
    plan(songs, store, extend=True)


def by_encode(songs: Path, store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    del capsys
    lm.encode(songs, store, device="cpu", extend=True)


def by_command(songs: Path, store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = runs.call(capsys, "encode", songs, store, "--device", "cpu", "--extend")
    assert result.code == 0, result.err


def by_config(songs: Path, store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    del capsys
    config = store.with_name("run.yaml")
    config.write_text("extend: true\nunit_seconds: null\ndevice: cpu\n")
    lm.encode(songs, store, config=config)


@pytest.mark.parametrize("extended", [by_plan, by_encode, by_command, by_config])
@pytest.mark.usefixtures("inline")
def test_excluded_files_stay_out_and_new_items_have_groups(
    songs: Path,
    store: Path,
    capsys: pytest.CaptureFixture[str],
    extended: Callable[[Path, Path, pytest.CaptureFixture[str]], None],
) -> None:
    write(*(songs / "three" / f"{stem}.wav" for stem in ("vocals", "drums", "mix")))
    extended(songs, store, capsys)
    assert stems(store) == {
        f"{song}/{role}": (song, role) for song in ("one", "three") for role in ("vocals", "drums")
    }


def test_changed_items_keep_their_groups(songs: Path, store: Path) -> None:
    write(songs / "one" / "drums.wav", seconds=2.0)
    extension = plan(songs, store, extend=True, retry_changed=True).extension
    assert extension is not None
    assert (extension.new, extension.changed) == (0, 1)
    assert stems(store)["one/drums"] == ("one", "drums")


def manifest(path: Path, titles: dict[str, str]) -> Path:
    """A manifest with a row for each id, whose key is in the column `name`."""
    write(*(path.with_name(f"{name}.wav") for name in titles))
    with path.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["name", "place", "title"])
        rows.writerows([f"id {name}", f"{name}.wav", title] for name, title in titles.items())
    return path


@pytest.mark.usefixtures("inline")
def test_rows_keep_their_keys(tmp_path: Path) -> None:
    rows, store = manifest(tmp_path / "rows.csv", {"a": "A", "b": "B"}), tmp_path / "store"
    lm.encode(rows, store, key_column="name", path_column="place", device="cpu")
    manifest(rows, {"a": "A", "b": "new", "c": "C"})
    summary = lm.encode(rows, store, device="cpu", extend=True, refresh_metadata=True)
    assert summary.extension is not None
    assert (summary.extension.new, summary.extension.vanished) == (1, 0)
    assert sorted(lm.open(store).keys()) == ["id a", "id b", "id c"]
    assert summary.refreshed is not None
    assert (summary.refreshed.records, summary.refreshed.values) == (1, 1)


@pytest.mark.parametrize("given", [{"unit_seconds": 2.5}, {"shard_size": 200_000}])
def test_new_units_have_the_planned_size(tmp_path: Path, given: dict[str, float]) -> None:
    """mdct stores 88,200 bytes for a second of audio."""
    songs, store = tmp_path / "songs", tmp_path / "store"
    write(*(songs / f"{number}.wav" for number in range(4)))
    assert plan(songs, store, **given).units == 2
    write(*(songs / f"more {number}.wav" for number in range(6)))
    assert plan(songs, store, extend=True).units == 5
    assert {unit.items for unit in planned(store).units} == {2}


def test_only_files_with_the_planned_extensions_are_added(tmp_path: Path) -> None:
    songs, store = tmp_path / "songs", tmp_path / "store"
    write(songs / "a.wav", songs / "b.flac")
    plan(songs, store, extensions=[".wav"])
    write(songs / "c.wav")
    plan(songs, store, extend=True)
    assert stems(store).keys() == {"a", "c"}


def test_the_planned_type_of_source_is_used(tmp_path: Path) -> None:
    rows, store = manifest(tmp_path / "rows.csv", {"a": "A"}), tmp_path / "store"
    write(*(tmp_path / "rows" / "x.csv" / name for name in ("1.wav", "2.wav")))
    plan(tmp_path / "rows", store, source_type="folder", group_by=ROLE)
    plan(tmp_path / "rows", store, extend=True)
    assert stems(store) == {"x.csv/1": ("x.csv", "1"), "x.csv/2": ("x.csv", "2")}
    # Another source is refused by its name, not by settings that it does not have.
    with pytest.raises(StoreError, match=r"^SOURCE changed: .*rows, this run would use .*rows.csv"):
        plan(rows, store, path_column="place", key_column="name", extend=True)


@pytest.mark.parametrize(
    ("given", "label"),
    [
        ({"include": ["*/mix.*"]}, r"--include changed: .*vocals.*, this run would use \*/mix"),
        ({"group_by": "(?P<group>.)"}, "--group-by changed: "),
        ({"unit_seconds": 7.0}, "--unit-seconds changed: .* no value, this run would use 7.0"),
        ({"source_type": "webdataset"}, "--source-type changed: .* no value"),
    ],
)
def test_other_values_are_still_refused(
    songs: Path, store: Path, given: dict[str, Any], label: str
) -> None:
    for extend in (False, True):
        if extend and "source_type" in given:
            continue  # the source is listed first
        with pytest.raises(StoreError, match=f"^{label}"):
            plan(songs, store, extend=extend, **given)
    plan(songs, store, extend=True, **STEMS)
    assert stems(store).keys() == {"one/vocals", "one/drums"}


def edit(store: Path, **values: Any) -> None:
    path = store / "plan" / "plan.json"
    document = {**json.loads(path.read_text()), **values}
    path.write_text(json.dumps({k: v for k, v in document.items() if v is not None}))


def test_a_plan_of_an_earlier_version_that_lacks_settings(tmp_path: Path) -> None:
    songs, store = tmp_path / "songs", tmp_path / "store"
    write(songs / "a.wav")
    plan(songs, store)
    edit(store, source_settings=None, unit_seconds=None, shard_size=None)
    write(songs / "b.wav")
    plan(songs, store, extend=True)
    assert stems(store) == {"a": (None, None), "b": (None, None)}


def test_other_default_extensions_of_an_earlier_version_are_no_setting(tmp_path: Path) -> None:
    """Sources that do not use extensions refuse them only if they are given."""
    rows, store = manifest(tmp_path / "rows.csv", {"a": "A"}), tmp_path / "store"
    plan(rows, store, path_column="place")
    edit(store, extensions=["wav", "flac"])
    assert plan(rows, store).items == 1
    manifest(rows, {"a": "A", "b": "B"})
    assert plan(rows, store, extend=True).items == 2


def test_a_damaged_plan_is_reported(
    songs: Path, store: Path, one_sentence: Callable[[BaseException], str]
) -> None:
    edit(store, source_settings={"include": 3})
    with pytest.raises(StoreError, match=r"plan/plan\.json is damaged") as caught:
        plan(songs, store, extend=True)
    assert one_sentence(caught.value)


def test_settings_of_a_plan_that_do_not_select_items_are_not_used(songs: Path, store: Path) -> None:
    edit(store, source_settings={**STEMS, "address": "ray://elsewhere:1", "copy_of": "x"})
    assert plan(songs, store, extend=True).items == 2


def test_a_source_that_is_gone_is_reported_as_before(songs: Path, store: Path) -> None:
    os.rename(songs, songs.with_name("moved"))  # noqa: PTH104
    assert plan(songs, store).items == 2
    with pytest.raises(SourceError, match="does not exist"):
        plan(songs, store, extend=True)
