"""Removing a field, and what the other commands show of fields."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from latentmill.cli import show_status
from latentmill.engine import lock
from latentmill.engine.holder import RunProgress
from latentmill.engine.lock import only_run
from latentmill.engine.running import current_run
from latentmill.errors import ConfigError, StoreError
from latentmill.evaluation.evaluate import evaluate
from latentmill.run.drop import drop
from latentmill.storage.storage import Storage
from latentmill.store.store import open_store
from support import runs
from support.fields import added, files


def test_nothing_is_left(store: Path) -> None:
    before = files(store)
    added(store)
    added(store, "third")
    field = files(store / "fields" / "second")
    dropped = drop(store, field="second")
    assert dropped.files == len(set(field) - {".lock"})
    assert dropped.bytes == sum(len(data) for _, data in field.values())
    assert sorted(path.name for path in (store / "fields").iterdir()) == ["second.dropped", "third"]
    runs.assert_whole(store / "fields" / "third")
    with pytest.raises(StoreError, match="has no field second: its fields are third"):
        drop(store, field="second")
    drop(store, field="third")
    assert left_in(store) == ["second.dropped", "third.dropped"]
    assert not (store / "tmp").exists()
    assert files(store) == before


def left_in(store: Path) -> list[str]:
    return sorted(str(path.relative_to(store / "fields")) for path in (store / "fields").rglob("*"))


def test_no_name_is_written_twice(store: Path) -> None:
    """Readers may have the shards of a dropped field open or cached by their names."""
    used: set[str] = set()
    for _ in range(3):
        added(store)
        field = store / "fields/second"
        written = {p.name for folder in ("shards", "commits") for p in (field / folder).iterdir()}
        assert written and not written & used
        used |= written
        runs.assert_whole(field)
        runs.assert_whole(store)
        added(store)  # resumed
        assert {p.name for p in (field / "shards").iterdir()} <= written
        drop(store, field="second")
    (store / "fields/second.dropped").write_text("x")
    with pytest.raises(StoreError, match=r"second\.dropped is damaged: stop what reads the field"):
        added(store)


def test_the_batch_size_of_a_model_goes_with_its_field(store: Path) -> None:
    """A field of another model in its place would use it, and it may not fit in memory."""
    added(store)
    batch_size = store / "fields/second/plan/batch.json"
    batch_size.write_text('{"batch_size": 256}')
    dropped = drop(store, field="second")
    assert dropped.kept == ()
    assert left_in(store) == ["second.dropped"]
    batch_size.parent.mkdir(parents=True)
    batch_size.write_text('{"batch_size": 256}')  # an earlier version has kept it
    added(store)
    assert not batch_size.exists()
    batch_size.write_text('{"batch_size": 16}')
    added(store)  # resumed: the field has a plan, so the batch size is its own
    assert batch_size.read_text() == '{"batch_size": 16}'


def test_a_drop_that_was_killed(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After each number of removed files: no half field can be read, and `drop` finishes it."""
    added(store)
    whole = store.parent / "whole"
    shutil.copytree(store, whole)
    delete = Storage.delete
    total = drop(store, field="second").files
    for number in range(1, total):
        shutil.rmtree(store)
        shutil.copytree(whole, store)
        left = [number]

        def killed(self: Storage, path: str, left: list[int] = left) -> None:
            if not left[0]:
                raise KeyboardInterrupt
            left[0] -= 1
            delete(self, path)

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(Storage, "delete", killed)
            drop(store, field="second")
        if number > 1:
            with pytest.raises(StoreError, match="is not a latentmill store"):
                open_store(str(store / "fields" / "second"))
            with pytest.raises(StoreError, match=r"run `latentmill drop .* --field second` first"):
                added(store)
        drop(store, field="second")
        assert left_in(store) == ["second.dropped"]
        assert (store / "fields/second.dropped").read_text() == "1"


@pytest.mark.parametrize("folder", ["shards", "commits", "plan", "tmp", "evaluation"])
def test_links_inside_a_field_are_not_followed(store: Path, tmp_path: Path, folder: str) -> None:
    added(store)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "000000.parquet").write_text("mine")
    linked = store / "fields" / "second" / folder
    if linked.exists():
        shutil.rmtree(linked)
    linked.symlink_to(elsewhere)
    with pytest.raises(StoreError, match="is a link"):
        drop(store, field="second")
    assert (elsewhere / "000000.parquet").read_text() == "mine"


def test_a_link_in_the_place_of_a_field(store: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(store, elsewhere)
    (store / "fields").mkdir()
    (store / "fields" / "second").symlink_to(elsewhere)
    before = files(elsewhere)
    with pytest.raises(StoreError, match="is a link"):
        drop(store, field="second")
    assert files(elsewhere) == before
    with pytest.raises(ConfigError, match="invalid field name"):
        drop(store, field="..")
    assert runs.latents(store) == runs.latents(elsewhere)


def test_files_of_the_user_stay(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    added(store)
    (store / "fields/second/notes.txt").write_text("mine")
    (store / "fields/second/shards/sub").mkdir()
    result = runs.call(capsys, "drop", store, "--field", "second")
    assert result.code == 0
    assert "kept, because latentmill did not write them: notes.txt" in result.out
    assert (store / "fields/second/notes.txt").read_text() == "mine"


MINE = (
    "notes.txt",
    "shards/mine.parquet",
    "shards/000000.txt",
    "commits/000000.json.bak",
    "plan/todo.json",
    "plan/items.csv",
    "annotations/labels.parquet",
    "evaluation/mine.json",
    "evaluation/vectors.npy",
)


def test_files_of_the_user_in_the_folders_of_a_field_stay(
    store: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """They are listed, and what is left is no field: no command finds fault with it."""
    added(store)
    field = store / "fields/second"
    evaluate(str(field), only=["statistics"])
    written = set(files(field)) - {".lock"}
    assert any(name.startswith("evaluation/vectors.") for name in written)
    for name in MINE:
        (field / name).parent.mkdir(exist_ok=True)
        (field / name).write_text("mine")
    dropped = drop(store, field="second")
    assert dropped.files == len(written)
    assert dropped.kept == tuple(sorted(MINE))
    assert set(files(field)) - {".lock"} == {*MINE}
    assert runs.call(capsys, "verify", store).code == 0
    assert "second" not in runs.call(capsys, "status", store).out
    assert drop(store, field="second").files == 0


def test_a_field_that_is_not_planned_yet(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An `add` that has only taken the lock, or an empty folder, is no fault of the store."""
    (store / "fields/empty").mkdir(parents=True)
    with only_run(Storage(str(store / "fields" / "second"))):
        assert (store / "fields/second").is_dir()
        result = runs.call(capsys, "verify", store)
        assert result.code == 0, result.out
        status = runs.call(capsys, "status", store)
    assert "it has no plan" not in status.out
    assert "second" not in status.out


def test_the_commands_on_a_store_with_damaged_fields(
    store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A field that is damaged or foreign is shown, and hides neither the store nor other fields."""
    added(store)
    fields = store / "fields"
    shutil.copytree(fields / "second", fields / "cut")
    (fields / "cut/plan/plan.json").write_text('{"format_version": 2')
    shutil.copytree(fields / "second", fields / "hurt")
    shard = next((fields / "hurt/shards").iterdir())
    shard.write_bytes(shard.read_bytes()[:-1] + b"\0")
    shutil.copytree(fields / "second", fields / "part")
    shutil.rmtree(fields / "part/plan")
    (fields / "part/dataset.json").unlink()
    (fields / "empty").mkdir()
    (fields / "odd\x1b[31m name").mkdir()
    (fields / "linked").symlink_to(tmp_path)
    (fields / "file").write_text("")
    shutil.copytree(store, fields / "foreign", ignore=shutil.ignore_patterns("fields"))
    result = runs.call(capsys, "status", store)
    assert result.code == 0, result.err
    assert "field     second: frames from audio by mdct, 5 encoded" in result.out
    assert "field     cut: Store" in result.out
    assert "field     part: it has no plan: remove it with `latentmill drop" in result.out
    assert "empty" not in result.out
    assert "field     foreign: it has no entry `field`" in result.out
    assert "odd" not in result.out
    assert "linked" not in result.out
    result = runs.call(capsys, "verify", store)
    assert result.code == 8
    assert "field second: 5 records of 5 items" in result.out
    assert "fault: field hurt: shards/" in result.out
    assert "fault: field cut: " in result.out
    assert "fault: field part: " in result.out
    assert "field linked" not in result.out
    result = runs.call(capsys, "info", store)
    assert "fields      cut, empty, foreign, hurt, part, second" in result.out
    for name in ("cut", "hurt", "empty", "part", "foreign"):
        assert runs.call(capsys, "drop", store, "--field", name).code == 0
    result = runs.call(capsys, "verify", store)
    assert result.code == 0, result.out


def test_only_the_folder_of_the_fields_is_written_to(store: Path) -> None:
    """The store itself may be read-only: here, it can have no folder for temporary files."""
    added(store)
    (store / "tmp").write_text("")
    drop(store, field="second")
    assert [path.name for path in (store / "fields").iterdir()] == ["second.dropped"]


def test_a_run_that_writes_to_a_field(store: Path) -> None:
    """`status` shows it, and a drop waits for it and is refused."""
    added(store)
    storage = Storage(str(store / "fields" / "second"))
    with only_run(storage) as hold:
        counts = {"units": 3, "units_done": 1, "units_in_flight": 1, "items": 5, "items_done": 2}
        seconds = {"audio_seconds": 1.0, "total_seconds": 3.0}
        hold.publish(RunProgress(**counts, **seconds, failed=0))
        text = show_status.status(show_status.StoreStatus.of(open_store(str(store))))
        running = current_run(storage)
        assert running is not None
        assert f"running: by {running.by}; 1 of 3 units" in text
        with pytest.MonkeyPatch.context() as patch, pytest.raises(StoreError, match="Another run"):
            patch.setattr(lock, "WAIT_SECONDS", 0.1)
            drop(store, field="second")
        assert len(open_store(storage.root)) == 5
