"""What the commands that copy a store do with its fields."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from latentmill.curation.merge import merge
from latentmill.curation.select import select
from latentmill.errors import ConfigError, StoreError
from latentmill.export.export import Target, export_store
from latentmill.publishing.sync import sync
from latentmill.run.drop import drop
from latentmill.store.store import open_store
from support import runs
from support.fields import OPTIONS, added, files
from support.in_process import encode

LEAVES_OUT: dict[str, Callable[[str, str], Any]] = {
    "select a copy": lambda store, dest: select(store, dest, copy=True),
    "merge copies": lambda store, dest: merge([store], dest, copy=True),
    "export": lambda store, dest: export_store(open_store(store), dest, Target.WEBDATASET),
}


@pytest.mark.parametrize("command", LEAVES_OUT)
def test_fields_are_left_out_with_a_warning(
    store: Path, tmp_path: Path, command: str, caplog: pytest.LogCaptureFixture
) -> None:
    LEAVES_OUT[command](str(store), str(tmp_path / "without"))
    assert "fields" not in caplog.text
    added(store)
    with caplog.at_level(logging.WARNING):
        LEAVES_OUT[command](str(store), str(tmp_path / "dest"))
    assert f"{store}: the" in caplog.text
    assert "does not include its fields: second" in caplog.text
    assert not list((tmp_path / "dest").rglob("fields"))


def test_fields_of_one_base_of_a_view_are_left_out_with_a_warning(
    store: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    encode(runs.write_songs(tmp_path / "other songs", 2), tmp_path / "other")
    view = merge([store, tmp_path / "other"], tmp_path / "view", prefix=True).dest
    added(tmp_path / "other")
    select(view, tmp_path / "copy", copy=True)
    assert f"{view}: the copy does not include its fields: second" in caplog.text


def test_sync_copies_complete_fields(
    songs: Path, store: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    added(store)
    (store / "fields" / "unfinished").mkdir()
    dest = tmp_path / "copy"
    planned = sync(store, dest, dry_run=True)
    assert not dest.exists()
    summary = sync(store, dest)
    assert summary.copied == planned.copied
    assert "fields/second/dataset.json" in summary.copied
    assert "fields/unfinished is not complete and was not copied" in caplog.text
    runs.assert_whole(dest)
    runs.assert_whole(dest / "fields" / "second")
    assert runs.latents(dest / "fields" / "second") == runs.latents(store / "fields" / "second")
    assert not (dest / "fields" / "unfinished").exists()
    assert sync(store, dest).copied == ()
    runs.write_songs(songs, 2, first=10)
    encode(songs, store, unit_seconds=3.0, extend=True)
    added(store)
    again = sync(store, dest)
    assert any(path.startswith("fields/second/shards/") for path in again.copied)
    assert len(runs.latents(dest / "fields" / "second")) == 7
    before = files(dest)
    added(dest)
    assert files(dest) == before, "the copy of a field is continued like the field"


def test_sync_after_a_field_was_replaced(
    store: Path, tmp_path: Path, one_sentence: Callable[[BaseException], str]
) -> None:
    """The copy of the old one must be dropped; until then everything else is copied."""
    dest = tmp_path / "copy"
    added(store)
    sync(store, dest)
    drop(store, field="second")
    added(store, model_options={**OPTIONS, "hop": 200})
    added(store, "third")
    with pytest.raises(ConfigError) as caught:
        sync(store, dest)
    advice = f"run `latentmill drop {dest} --field second`, then run sync again"
    assert advice in one_sentence(caught.value)
    assert runs.latents(dest / "fields/third") == runs.latents(store / "fields/third")
    drop(dest, field="second")
    sync(store, dest)
    assert runs.latents(dest / "fields/second") == runs.latents(store / "fields/second")


def test_sync_after_a_field_was_added_again(store: Path, tmp_path: Path) -> None:
    """With the same settings, its shards are newer revisions of those of the old one."""
    dest = tmp_path / "copy"
    added(store)
    sync(store, dest)
    drop(store, field="second")
    added(store)
    sync(store, dest)
    runs.assert_whole(dest / "fields/second")
    shards = [
        sorted(path.name for path in (place / "fields/second/shards").iterdir())
        for place in (store, dest)
    ]
    assert shards[0] == shards[1]
    assert runs.latents(dest / "fields/second") == runs.latents(store / "fields/second")


def test_a_link_at_the_destination(store: Path, tmp_path: Path) -> None:
    added(store)
    sync(store, tmp_path / "copy")
    shutil.rmtree(tmp_path / "copy/fields")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "copy" / "fields").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(StoreError, match="is a link"):
        sync(store, tmp_path / "copy")
    assert not list((tmp_path / "elsewhere").iterdir())


def test_a_field_is_not_encoded_into(songs: Path, store: Path) -> None:
    added(store)
    with pytest.raises(StoreError, match=rf"use `latentmill add {store} --field second`"):
        encode(songs, store / "fields" / "second", unit_seconds=3.0, model_options=OPTIONS)
