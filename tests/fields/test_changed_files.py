"""Fields from audio whose files change, and cannot be loaded when the store or the field is run."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

import numpy as np
import pytest
import soundfile

import latentmill as lm
from latentmill.cli import show_status
from latentmill.run.run import RunSummary
from latentmill.store.store import open_store
from support import runs
from support.fields import OPTIONS, added, state
from support.in_process import encode

KEY, OTHER = "album 1/song 01", "album 2/song 02"
PATH = f"{KEY}.wav"


@pytest.fixture
def store(songs: Path, tmp_path: Path) -> Path:
    """A store of one unit, with a field."""
    encode(songs, tmp_path / "store", unit_seconds=60.0)
    added(tmp_path / "store")
    return tmp_path / "store"


def change(songs: Path, key: str, samples: int) -> None:
    noise = np.random.default_rng(samples).uniform(-0.3, 0.3, samples)
    soundfile.write(songs / f"{key}.wav", noise, 44100, subtype="FLOAT")


def encode_changed(songs: Path, store: Path) -> RunSummary:
    return encode(songs, store, unit_seconds=60.0, extend=True, retry_changed=True)


def lengths(store: Path) -> tuple[float, float]:
    """How long the audio is that the store and the field have of the item, in hundredths of 1 s."""
    both = [open_store(str(root)) for root in (store, store / "fields" / "second")]
    one, other = (root[KEY].num_samples / root.info.model["sample_rate"] for root in both)
    return round(100 * one), round(100 * other)


def assert_behind(store: Path, count: int) -> None:
    found = state(store)
    assert (found.behind, found.complete) == (count, not count)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        lm.LatentDataset(str(store), fields=["second"])
    assert not count or [one.category for one in warned] == [lm.FieldBehindWarning]
    runs.assert_whole(store)
    runs.assert_whole(store / "fields" / "second")


def test_a_changed_file_that_the_field_cannot_load(songs: Path, store: Path) -> None:
    """The field keeps its value and stays behind until it has that of the changed file."""
    hidden = songs.parent / "hidden"
    change(songs, KEY, 88_200)
    encode_changed(songs, store)
    (songs / PATH).rename(hidden)
    for _ in range(2):  # every `add` tries again
        summary = added(store)
        assert [key for key, _ in summary.kept] == [KEY]
        assert state(store).kept == summary.kept
        text = show_status.status(show_status.StoreStatus.of(open_store(str(store))))
        assert f"  kept in second: {': '.join(summary.kept[0])}" in text.splitlines()
        assert lengths(store) == (200, 102)
        assert_behind(store, 1)
    change(songs, OTHER, 40_000)
    assert [key for key, _ in encode_changed(songs, store).kept] == [KEY]
    assert_behind(store, 2)
    assert [key for key, _ in added(store).kept] == [KEY]
    assert lengths(store) == (200, 102)
    assert_behind(store, 1)
    hidden.rename(songs / PATH)
    assert added(store).kept == ()
    assert lengths(store) == (200, 200)
    assert_behind(store, 0)


def test_a_changed_file_that_the_store_has_planned_but_not_encoded(
    songs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = tmp_path / "store"
    encode(songs, store, unit_seconds=60.0)
    change(songs, KEY, 88_200)

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("latentmill.engine.worker.Worker.encode", interrupted)
        with pytest.raises(KeyboardInterrupt):
            encode_changed(songs, store)
    assert added(store).failures == ()
    encode_changed(songs, store)
    assert added(store).failures == ()
    assert lengths(store) == (200, 200)
    assert_behind(store, 0)


@pytest.mark.parametrize("rewritten", [False, True])
def test_a_changed_file_that_the_store_cannot_load(
    songs: Path, store: Path, rewritten: bool
) -> None:
    """The field has the value of the changed file after the store, not before."""
    change(songs, KEY, 88_200)
    audio, times = (songs / PATH).read_bytes(), (songs / PATH).stat()
    (songs / PATH).write_bytes(bytes(len(audio)))
    os.utime(songs / PATH, ns=(times.st_atime_ns, times.st_mtime_ns))
    if rewritten:  # the unit of the field, because another item has changed, too
        change(songs, OTHER, 40_000)
    assert [key for key, _ in encode_changed(songs, store).kept] == [KEY]
    assert_behind(store, int(rewritten))
    (songs / PATH).write_bytes(audio)
    os.utime(songs / PATH, ns=(times.st_atime_ns, times.st_mtime_ns))
    for again in (False, True):
        added(store, retry_failed=again)
        assert lengths(store) == (102, 102)
        assert_behind(store, 0)
    encode(songs, store, unit_seconds=60.0, retry_failed=True)
    assert lengths(store) == (200, 102)
    assert_behind(store, 1)
    added(store)
    assert lengths(store) == (200, 200)
    assert_behind(store, 0)


def written_manifest(songs: Path) -> Path:
    """A manifest, whose plan has neither sizes nor times."""
    rows = sorted(str(path) for path in songs.rglob("*.wav"))
    (songs.parent / "songs.csv").write_text("\n".join(["path", *rows]))
    return songs.parent / "songs.csv"


@pytest.mark.parametrize("format_name", ["parquet", "webdataset"])
def test_another_file_at_the_path_of_a_manifest(
    songs: Path, tmp_path: Path, format_name: str
) -> None:
    """The item fails, also if it is computed again, until the file is the encoded one."""
    store, alone = tmp_path / "listed", tmp_path / "alone"
    manifest = written_manifest(songs)
    encode(manifest, store, format=format_name)
    encode(manifest, alone, format=format_name, model_options=OPTIONS)
    original = (songs / PATH).read_bytes()
    change(songs, KEY, 88_200)
    for again in (False, True):
        summary = added(store, retry_failed=again)
        assert summary.exit_code == 3
        assert [key for key, _ in summary.failures] == [f"songs/{KEY}"]
        assert summary.failures[0][1] == (
            "its file is not the one that the store has encoded: restore that file"
        )
        assert summary.info.encoded == 4
    (songs / PATH).write_bytes(original)
    assert added(store, retry_failed=True).failures == ()
    assert runs.latents(store / "fields" / "second") == runs.latents(alone)


def test_another_file_under_a_copy_of_records(songs: Path, store: Path, tmp_path: Path) -> None:
    """The plan of such a copy has neither sizes nor times."""
    lm.select(store, tmp_path / "copy", copy=True)
    change(songs, KEY, 88_200)
    summary = added(tmp_path / "copy")
    assert [key for key, _ in summary.failures] == [KEY]
    assert summary.info.encoded == 4


def test_a_value_is_kept_if_the_file_is_not_the_one_of_the_store(songs: Path, store: Path) -> None:
    """Its size and time are the planned ones, but the store has encoded other bytes."""
    before = runs.latents(store / "fields" / "second")
    change(songs, KEY, 88_200)
    encode_changed(songs, store)
    audio, times = (songs / PATH).read_bytes(), (songs / PATH).stat()
    (songs / PATH).write_bytes(audio[:-4] + b"\0" * 4)
    os.utime(songs / PATH, ns=(times.st_atime_ns, times.st_mtime_ns))
    ((key, reason),) = added(store).kept
    assert (key, "not the one that the store has encoded" in reason) == (KEY, True)
    assert runs.latents(store / "fields" / "second") == before
    assert_behind(store, 1)


def test_one_pass_does_not_pair_a_kept_latent_with_another_file(
    songs: Path, tmp_path: Path
) -> None:
    """The model of the store cannot take the changed file; that of the field can."""
    stereo = {"model_options": {"hop": 64, "sample_rate": 44100, "channels": 2}}
    fields = {"second": {"model": "mdct", "model_options": OPTIONS}}
    store = tmp_path / "stereo"
    encode(songs, store, unit_seconds=60.0, **stereo)
    before = runs.latents(store)
    noise = np.random.default_rng(1).uniform(-0.3, 0.3, (88_200, 3))
    soundfile.write(songs / PATH, noise, 44100, subtype="FLOAT")
    changed = {"extend": True, "retry_changed": True, "with_fields": fields}
    summary = encode(songs, store, unit_seconds=60.0, **stereo, **changed)
    assert [key for key, _ in summary.kept] == [KEY]
    assert runs.latents(store) == before
    ((key, reason),) = summary.fields["second"].failures
    assert (key, "not the one that the store has encoded" in reason) == (KEY, True)
    assert summary.fields["second"].info.encoded == 4
