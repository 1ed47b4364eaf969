"""A field: another model over the items of a store, in `fields/NAME/`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from latentmill.curation.select import select
from latentmill.engine import launch
from latentmill.errors import ConfigError, LatentmillError, StoreError
from latentmill.run import add
from latentmill.store.store import open_store
from support import runs
from support.fields import OPTIONS, added, files
from support.in_process import encode, spoil


def test_a_field_has_the_values_of_a_run_of_its_model(
    songs: Path, store: Path, tmp_path: Path
) -> None:
    before = files(store)
    summary = added(store)
    assert summary.exit_code == 0
    assert files(store) == before
    field = store / "fields" / "second"
    runs.assert_whole(field)
    encode(songs, tmp_path / "alone", unit_seconds=3.0, model_options=OPTIONS)
    assert runs.latents(field) == runs.latents(tmp_path / "alone")
    assert runs.latents(field).keys() == runs.latents(store).keys()
    opened, base = open_store(str(field)), open_store(str(store))
    assert [(unit.name, unit.hash) for unit in opened.plan.units] == [
        (unit.name, unit.hash) for unit in base.plan.units
    ]
    assert json.loads((field / "dataset.json").read_text())["field"] == {
        "name": "second",
        "kind": "frames",
        "source": "audio",
        "window_seconds": None,
    }
    assert "field" not in json.loads((store / "dataset.json").read_text())
    again = added(store)
    assert again.resumed_units == again.units > 1


def test_a_field_of_a_store_that_is_not_finished(
    songs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The units of the plan are computed, whether the store has them already or not."""
    spoil(next(songs.rglob("song 03.wav")))
    store = tmp_path / "store"

    def killed(*args: Any) -> None:
        some = [unit for unit in args[4] if unit.number < 1]
        inline(*args[:4], some, *args[5:])
        raise KeyboardInterrupt

    inline = launch.encode_units
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(launch, "encode_units", killed)
        encode(songs, store, unit_seconds=3.0)
    assert not (store / "dataset.json").exists()
    assert added(store).info.encoded == 4
    encode(songs, store, unit_seconds=3.0)
    added(store)
    entries = {
        item.key: item.status
        for commit in open_store(str(store / "fields" / "second")).commits.values()
        for item in commit.items
    }
    assert sorted(entries.values()) == ["encoded"] * 4 + ["skipped"]


def test_items_that_the_store_lacks_are_skipped_with_the_reason(
    songs: Path, tmp_path: Path
) -> None:
    broken = next(songs.rglob("song 03.wav"))
    spoil(broken)
    store = tmp_path / "store"
    encode(songs, store, unit_seconds=3.0, max_seconds=1.05)
    summary = added(store)
    assert not summary.failures
    reasons = dict(summary.skipped)
    assert len(reasons) == 5 - summary.info.encoded > 1
    assert reasons["album 0/song 03"].startswith("failed in the base store: ")
    assert "skipped in the base store: max_seconds" in " ".join(reasons.values())
    runs.assert_whole(store / "fields" / "second")
    assert runs.latents(store).keys() == runs.latents(store / "fields" / "second").keys()


@pytest.mark.parametrize(
    "name", ["", ".", "..", "a/b", "../x", "a b", "-a", "_a", "é", "a" * 65, "a\n", "a\0"]
)
def test_names_that_are_not_those_of_a_field(store: Path, name: str) -> None:
    before = files(store.parent)
    with pytest.raises(ConfigError, match="invalid field name"):
        added(store, name)
    assert files(store.parent) == before
    assert not (store / "fields").exists()


def test_what_cannot_have_fields(store: Path, tmp_path: Path) -> None:
    added(store)
    with pytest.raises(StoreError, match="is a field, and a field cannot have fields"):
        added(store / "fields" / "second", "third")
    select(str(store), str(tmp_path / "view"), keys=["album 0/song 00"])
    with pytest.raises(StoreError, match="is a view, whose fields are those of its base stores"):
        added(tmp_path / "view")
    with pytest.raises(StoreError, match="is not a latentmill store"):
        added(tmp_path / "nothing")
    assert not (tmp_path / "nothing").exists()


@pytest.mark.parametrize("link", ["fields", "fields/second"])
def test_a_link_is_not_followed(store: Path, tmp_path: Path, link: str) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (store / link).parent.mkdir(exist_ok=True)
    (store / link).symlink_to(elsewhere)
    with pytest.raises(StoreError, match="is a link"):
        added(store)
    assert not list(elsewhere.iterdir())


def test_other_settings_for_the_same_field(store: Path) -> None:
    added(store)
    with pytest.raises(StoreError, match=r"--model-option hop changed.*latentmill drop"):
        added(store, model_options={**OPTIONS, "hop": 200})
    with pytest.raises(LatentmillError, match="--workers"):
        added(store, workers=0)
    for name, value in (("min_seconds", 1.0), ("format", "webdataset"), ("extend", True)):
        with pytest.raises(ConfigError, match="is not a setting of a field"):
            added(store, **{name: value})
    with pytest.raises(ConfigError, match="unknown setting modle"):
        added(store, modle="mdct")


def test_large_shards_are_announced(
    store: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    added(store)
    assert "shard" not in caplog.text
    monkeypatch.setattr(add, "LARGE_SHARD", 1000)
    added(store)
    assert "the largest shard of field second will have about" in caplog.text


def test_a_folder_of_other_files_is_refused(store: Path) -> None:
    (store / "fields/second/shards").mkdir(parents=True)
    (store / "fields/second/shards/x").write_text("")
    with pytest.raises(StoreError, match=r"has files but no plan.* --field second"):
        added(store)


def test_the_command(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = ("add", store, "--field", "second", "--device", "cpu")
    options = ("--model-option", "hop=100", "--model-option", "sample_rate=16000")
    result = runs.call(capsys, *args)
    assert (result.code, result.err) == (
        2,
        "latentmill: --model is missing: `latentmill models` lists the models.\n",
    )
    result = runs.call(capsys, *args, "--model", "mdct", *options, "--json")
    assert result.code == 0, result.err
    assert runs.outcome(result)["info"]["field"]["name"] == "second"  # type: ignore[index]
    result = runs.call(capsys, *args, "--model", "mdct", *options)
    assert "nothing to encode: every unit is committed already" in result.out
    assert "--extend" not in result.out
