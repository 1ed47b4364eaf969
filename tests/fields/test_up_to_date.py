"""Fields after their store has changed: what is behind, and what the same command then does."""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

import latentmill as lm
from latentmill.cli import show_status
from latentmill.errors import ConfigError, StoreError
from latentmill.models.embedder import EmbedderSpec
from latentmill.run import add
from latentmill.run.add import run_add
from latentmill.store.store import open_store
from support import runs
from support.fields import OPTIONS, added, files, given, state, write_import
from support.in_process import encode, spoil


def shard_rows(field: Path) -> dict[str, tuple[str, bytes]]:
    """Where each record is, and its stored bytes."""
    opened = open_store(str(field))
    return {one.key: (opened.entry(one.key).shard, one.latent.tobytes()) for one in opened}


def records(field: Path) -> dict[str, dict[str, object]]:
    """Everything of every record."""
    return {
        one.key: {**vars(one), "latent": one.latent.tobytes(), "_decode_start": None}
        for one in open_store(str(field))
    }


def test_new_items_of_the_store(songs: Path, store: Path, tmp_path: Path) -> None:
    added(store)
    assert state(store).complete
    field = store / "fields" / "second"
    before = files(field)
    runs.write_songs(songs, 3, first=10)
    encode(songs, store, unit_seconds=3.0, extend=True)
    now = state(store)
    assert (now.behind, now.encoded, now.items, now.complete) == (3, 5, 8, False)
    assert "behind by 3 items" in show_status.status(
        show_status.StoreStatus.of(open_store(str(store)))
    )
    summary = added(store)
    assert summary.resumed_units == len([path for path in before if path.startswith("commits/")])
    after = files(field)
    kept = {path for path in before if path.startswith(("commits/", "shards/"))}
    assert {path: before[path] for path in kept}.items() <= after.items()
    assert state(store).complete
    runs.assert_whole(field)
    encode(songs, tmp_path / "alone", unit_seconds=3.0, model_options=OPTIONS)
    assert runs.latents(field) == runs.latents(tmp_path / "alone")


def test_an_item_that_was_encoded_again(songs: Path, store: Path) -> None:
    """Only this item is computed; the records beside it are copied, with all their fields."""
    added(store)
    field = store / "fields" / "second"
    before = records(field)
    path = next(songs.rglob("song 01.wav"))
    key = "album 1/song 01"
    noise = np.random.default_rng(99).uniform(-0.3, 0.3, 50_000)
    soundfile.write(path, noise, 44100, subtype="FLOAT")
    assert state(store).complete
    encode(songs, store, unit_seconds=3.0, extend=True)
    assert state(store).complete, "the store itself still has the old item"
    encode(songs, store, unit_seconds=3.0, extend=True, retry_changed=True)
    assert state(store).behind == 1
    summary = added(store)
    assert summary.units - summary.resumed_units == 1
    assert state(store).complete
    runs.assert_whole(field)
    after = records(field)
    assert before.keys() == after.keys()
    assert {k for k in before if before[k] != after[k]} == {key}
    assert after[key]["num_samples"] == round(50_000 * 16_000 / 44_100)
    beside = [k for k in after if shard_rows(field)[k][0].endswith(".r1.parquet")]
    assert len(beside) > 1
    again = added(store)
    assert again.resumed_units == again.units


def opened_with(store: Path, name: str) -> list[str]:
    """The warnings of a reader."""
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        lm.LatentDataset(str(store), fields=[name], missing_fields="leave_out")
        lm.LatentStream(str(store), fields=[name], missing_fields="leave_out")
    assert {one.category for one in found} <= {lm.FieldBehindWarning}
    return [str(one.message) for one in found]


def test_a_reader_is_warned_of_values_that_may_be_out_of_date(songs: Path, store: Path) -> None:
    added(store)
    assert opened_with(store, "second") == []
    runs.write_songs(songs, 1, first=10)
    encode(songs, store, unit_seconds=3.0, extend=True)
    first, second = opened_with(store, "second")
    assert first == second
    assert first.startswith(f"field 'second' of {store} may be out of date")
    assert f"`latentmill status {store}`" in first
    rows = store.parent / "rows.jsonl"
    rows.write_text('{"key": "album 1/song 01", "text": "a"}\n')
    added(store)
    lm.annotate(store, rows)
    assert opened_with(store, "second") == [], "it is computed from the audio"
    runs.assert_whole(store / "fields" / "second")


def test_a_reader_is_warned_of_texts_that_have_changed(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = write_import(tmp_path / "v.jsonl", {"album 1/song 01": [1.0]})
    lm.add(store, field="own", source=str(values))
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"key": "album 1/song 01", "text": "a"}\n')
    lm.annotate(store, rows)
    model = given(
        monkeypatch, EmbedderSpec("one", "vector", "text", 1), lambda _: np.ones((1, 1), "f")
    )
    lm.add(store, field="text", source="metadata:text", model=model, device="cpu")
    assert opened_with(store, "text") == []
    for changed in ({"mood": "calm"}, {"text": "b"}):
        rows.write_text(json.dumps({"key": "album 1/song 01", **changed}))
        lm.annotate(store, rows)
    assert len(opened_with(store, "text")) == 2
    assert opened_with(store, "own") == []
    lm.add(store, field="text", source="metadata:text", model=model, device="cpu")
    assert opened_with(store, "text") == []
    rows.write_text(json.dumps({"key": "album 2/song 02", "mood": "loud"}))
    lm.annotate(store, rows)
    assert len(opened_with(store, "text")) == 2  # perhaps: the file of annotations is another one
    lm.add(store, field="text", source="metadata:text", model=model, device="cpu")
    assert opened_with(store, "text") == [], "add has found that nothing is out of date"


def test_a_reader_is_warned_of_texts_that_were_annotated_on_a_view(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, keys = tmp_path / "rows.jsonl", list(lm.open(store).keys())

    def annotate(url: Path, prefix: str, *values: dict[str, str]) -> None:
        pairs = zip(keys, values, strict=False)
        rows.write_text("\n".join(json.dumps({"key": prefix + key, **own}) for key, own in pairs))
        lm.annotate(url, rows)

    def add_field() -> None:
        lm.add(store, field="text", source="metadata:text", model=model, device="cpu")

    model = given(
        monkeypatch, EmbedderSpec("one", "vector", "text", 1), lambda _: np.ones((1, 1), "f")
    )
    annotate(store, "", *({"text": f"text {number}"} for number in range(len(keys))))
    add_field()
    view = tmp_path / "view"
    lm.merge([store], view, prefix=True)
    assert opened_with(view, "text") == []
    annotate(view, "store/", {"text": "text 0"}, {"mood": "calm"})
    assert opened_with(view, "text") == [], "the texts are the same"
    annotate(view, "store/", {"text": "text 0"}, {"text": "new"})
    found = opened_with(view, "text")
    assert len(found) == 2
    expected = f"{view} has other values for 1 record: to use those of the view, annotate {store}"
    assert expected in found[0]
    path = view / "dataset.json"  # as an earlier version wrote it, which marked nothing
    info = json.loads(path.read_text())
    info["annotation"]["refreshed"] = []
    path.write_text(json.dumps(info))
    assert opened_with(view, "text") == []
    annotate(store, "", {}, {"text": "new"})
    add_field()
    assert opened_with(view, "text") == []


def test_an_item_that_the_store_gets_and_loses(songs: Path, tmp_path: Path) -> None:
    """A failed item of the store is skipped in the field, until the store has it."""
    path = next(songs.rglob("song 02.wav"))
    audio = path.read_bytes()
    spoil(path)
    store = tmp_path / "store"
    encode(songs, store, unit_seconds=3.0)
    assert added(store).info.skipped == 1
    path.write_bytes(audio)
    encode(songs, store, unit_seconds=3.0, extend=True, retry_changed=True)
    assert state(store).behind == 1
    summary = added(store)
    assert (summary.info.encoded, summary.info.skipped) == (5, 0)
    spoil(path)
    encode(songs, store, unit_seconds=3.0, extend=True, retry_changed=True)
    assert state(store).complete  # the store keeps its record, so the field keeps its own
    summary = added(store)
    assert (summary.info.encoded, len(summary.kept)) == (5, 0)
    assert state(store).complete
    (store / open_store(str(store)).entry("album 2/song 02").shard).unlink()
    encode(songs, store, unit_seconds=3.0)
    assert state(store).behind == 1
    summary = added(store)
    assert (summary.info.encoded, summary.info.skipped) == (4, 1)
    assert state(store).complete
    assert runs.latents(store).keys() == runs.latents(store / "fields" / "second").keys()


def test_failed_items_of_a_field(songs: Path, store: Path) -> None:
    """They fail again only if asked to be retried; other records keep their bytes."""
    path = next(songs.rglob("song 02.wav"))
    audio, times = path.read_bytes(), path.stat()
    path.unlink()
    summary = added(store)
    assert summary.exit_code == 3
    field = store / "fields" / "second"
    before = runs.latents(field)
    path.write_bytes(audio)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    again = added(store)
    assert again.resumed_units == again.units
    assert not state(store).behind
    assert [key for key, _ in state(store).failures] == ["album 2/song 02"]
    retried = added(store, retry_failed=True)
    assert retried.exit_code == 0
    assert before.items() <= runs.latents(field).items()
    assert len(runs.latents(field)) == 5
    runs.assert_whole(field)


def test_a_missing_shard_of_a_field(store: Path) -> None:
    """A unit whose shard is gone is computed again, because nothing can be copied."""
    added(store)
    field = store / "fields" / "second"
    before = runs.latents(field)
    next((field / "shards").iterdir()).unlink()
    added(store)
    assert runs.latents(field) == before
    runs.assert_whole(field)


@pytest.mark.parametrize("per_window", [False, True])
def test_vectors(songs: Path, store: Path, tmp_path: Path, per_window: bool) -> None:
    """One for the item, the mean over its windows by their length, or one for each window."""
    model = "python:support.vector_model:build"
    options = {"model": model, "model_options": {}, "dtype": "float32"}
    given = {**options, "device": "cpu", "threads": 1}
    run_add(str(store), "v", given, per_window=per_window)
    encode(songs, tmp_path / "frames", unit_seconds=3.0, **options)
    opened = open_store(str(store / "fields" / "v"))
    entry = json.loads((store / "fields/v/dataset.json").read_text())["field"]
    assert entry["kind"] == "vector"
    rate = opened.info.model["sample_rate"]
    assert entry["window_seconds"] == (256 / rate if per_window else None)
    uneven = False
    for record in open_store(str(tmp_path / "frames")):
        frames = record.latent.astype(np.float64)
        starts = range(0, 256 * frames.shape[1], 256)
        lengths = [min(256, max(0, record.num_samples - start)) for start in starts]
        mean = sum(n * frame for n, frame in zip(lengths, frames.T, strict=True)) / sum(lengths)
        uneven |= any(0 < length < 128 for length in lengths)
        wanted = frames if per_window else mean[:, None]
        assert opened[record.key].latent.shape == wanted.shape
        np.testing.assert_allclose(opened[record.key].latent, wanted, rtol=1e-5, atol=1e-7)
    assert uneven, "the last window of an item is much shorter than the others"
    runs.assert_whole(store / "fields" / "v")
    with pytest.raises(
        StoreError, match=r"windows of \d\S* s.*no windows|no windows.*windows of \d\S* s"
    ):
        run_add(str(store), "v", given, per_window=not per_window)
    with pytest.raises(ConfigError, match="--stitch none keeps overlapping chunks, but the values"):
        run_add(str(store), "chunks", {**given, "stitch": "none"}, per_window=per_window)
    assert not (store / "fields/chunks").exists()


def test_the_store_is_extended_while_the_model_is_resolved(
    songs: Path, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The field has the plan that the store has once the run holds the field, not an older one."""
    prepare = add.set_up

    def extended(config: Any) -> Any:
        monkeypatch.setattr(add, "set_up", prepare)
        setup = prepare(config)
        runs.write_songs(songs, 2, first=10)
        encode(songs, store, unit_seconds=3.0, extend=True)
        added(store)
        return setup

    monkeypatch.setattr(add, "set_up", extended)
    assert added(store).info.encoded == 7
    assert runs.latents(store / "fields" / "second").keys() == runs.latents(store).keys()
