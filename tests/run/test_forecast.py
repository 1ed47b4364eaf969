"""`latentmill plan`: what it says is what `encode` then does; headers tell lengths."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile
import typer

from audio.audio_files import encoded
from latentmill.cli import show
from latentmill.cli.app import app
from latentmill.config import load_config
from latentmill.encoding.chunks import Chunking
from latentmill.models import registry
from latentmill.plan import iter_keys, load, probe, read_items
from latentmill.plan.items import draft_table
from latentmill.plan.probe import probed
from latentmill.run import prepare as planning
from latentmill.run.forecast import Forecast, forecast, measure
from latentmill.run.prepare import listed, planned, prepare
from latentmill.sources.base import ByteRange, Item, Segment
from latentmill.sources.folder import FolderSource
from latentmill.storage.storage import Storage
from support import runs
from support.in_process import encode, spoil
from support.sources import put, tar_of

FORMATS = ("wav", "flac", "ogg", "mp3", "aiff")


@pytest.fixture(scope="module")
def songs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A song in each format, 61 s of noise each, whose sizes say little of their lengths."""
    folder = tmp_path_factory.mktemp("songs")
    noise = np.random.default_rng(0).uniform(-0.1, 0.1, 61 * 22050).astype(np.float32)
    for name in FORMATS:
        soundfile.write(folder / f"{name}.{name}", noise, 22050)
    (folder / "notes.md").write_text("nothing")
    return folder


def test_a_forecast_freezes_the_plan_that_encode_resumes(songs: Path, tmp_path: Path) -> None:
    options = {"source": str(songs), "out": str(tmp_path / "s"), "device": "cpu", "probe": False}
    config = load_config(None, options)
    value = forecast(config, calibrated=False)
    frozen = load(Storage(config.out))
    assert frozen is not None
    assert (value.items, value.units, value.committed) == (5, len(frozen.units), 0)
    assert value.formats == dict.fromkeys(FORMATS, 1)
    assert value.ignored == {".md": 1}
    assert value.estimated_items == 5
    assert value.hours == pytest.approx(value.estimated_hours)
    assert value.source_bytes == sum(f.stat().st_size for f in songs.iterdir() if f.stem != "notes")
    prepared = prepare(config)
    assert listed(prepared) is None
    assert planned(prepared, None) == (frozen, None, None)
    assert forecast(config, calibrated=False) == value
    assert "of it estimated because the length of 5 items is unknown" in show.forecast(value)


def test_ignored_files_whose_extensions_are_not_utf8_are_counted_in_the_plan(
    tmp_path: Path,
) -> None:
    """A plan with half a surrogate pair could not be read again."""
    (tmp_path / "in").mkdir()
    soundfile.write(tmp_path / "in" / "a.wav", np.zeros(22050), 22050)
    members = [("a.wav", (tmp_path / "in" / "a.wav").read_bytes())]
    members += [("b.caf\udce9", b"1"), ("b.caf\\xe9", b"1"), ("c.é", b"1")]
    put(str(tmp_path / "in.tar"), tar_of(members))
    config = load_config(None, {"source": str(tmp_path / "in.tar"), "out": str(tmp_path / "s")})
    counted = {".caf\\xe9": 2, ".é": 1}
    assert forecast(config, calibrated=False).ignored == counted
    frozen = load(Storage(config.out))
    assert frozen is not None
    assert frozen.ignored == counted


@pytest.mark.parametrize("probe", [True, None])
def test_headers_give_the_true_hours(songs: Path, tmp_path: Path, probe: bool | None) -> None:
    """Without being asked for, too: these files lie on this machine."""
    options = {"source": str(songs), "out": str(tmp_path / "s"), "device": "cpu", "probe": probe}
    value = forecast(load_config(None, options), calibrated=True)
    assert value.estimated_items == 0
    assert value.hours * 3600 == pytest.approx(5 * 61, abs=0.2)
    assert value.latent_bytes == pytest.approx(5 * 61 * 44100 * 2, rel=1e-3)  # mdct in float16
    assert value.calibration is not None
    assert value.run_seconds is not None
    assert value.run_seconds * value.calibration.x_real_time == pytest.approx(
        value.hours * 3600 / value.calibration.workers
    )
    text = show.forecast(value)
    assert "0.085 h, known" in text
    assert "x real time measured on a short sample)" in text


def test_speed_is_audio_over_time() -> None:
    handle = registry.resolve("mdct")
    assert measure(handle, Chunking.for_model(handle.spec), "cpu", 2, seconds=0.05) > 1


def by_key(items: list[Item]) -> dict[str, float | None]:
    return {item.key: item.seconds for item in probed(items)}


def test_headers_are_read_where_the_length_is_unknown(songs: Path, tmp_path: Path) -> None:
    items = list(FolderSource(str(songs), FORMATS).items())
    assert by_key(items) == pytest.approx(dict.fromkeys(FORMATS, 61.0), abs=0.1)
    known = [dataclasses.replace(item, uri="/gone", seconds=5.0) for item in items]
    assert set(by_key(known).values()) == {5.0}  # nobody looked
    parts = [dataclasses.replace(item, segment=Segment(60.0)) for item in items]
    assert by_key(parts) == pytest.approx(dict.fromkeys(FORMATS, 1.0), abs=0.1)
    (tmp_path / "broken.wav").write_text("no audio")
    broken = Item("broken", str(tmp_path / "broken.wav"), 8, "")
    assert by_key([broken, dataclasses.replace(broken, key="gone", uri="/gone")]) == {
        "broken": None,
        "gone": None,
    }


@pytest.mark.parametrize(("in_tar", "listed"), [(False, True), (True, True), (False, False)])
def test_of_a_long_recording_elsewhere_the_ends_are_fetched(
    songs: Path, in_tar: bool, listed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probe, "ENDS", 20_000)
    remote = fsspec.filesystem("memory")
    fetched = []
    real = probe.read_bytes

    def counted(uri: str, start: int, end: int) -> bytes:
        fetched.append(end - start)
        return real(uri, start, end)

    monkeypatch.setattr(probe, "read_bytes", counted)
    items = []
    for item in FolderSource(str(songs), FORMATS).items():
        data = Path(item.uri).read_bytes()
        place = ByteRange(512, len(data)) if in_tar else None
        remote.pipe_file(f"/probe/{item.key}.{in_tar}", in_tar * bytes(512) + data)
        uri = f"memory://probe/{item.key}.{in_tar}"
        size = item.size if listed else 0  # a manifest says nothing of it
        items.append(dataclasses.replace(item, uri=uri, place=place, size=size, version=""))
    assert by_key(items) == pytest.approx(dict.fromkeys(FORMATS, 61.0), abs=0.1)
    assert fetched == [20_000] * 10
    assert [item.size for item in probed(items)] == [item.size for item in items]


@pytest.mark.parametrize("kind", ["webdataset", "parquet"])
def test_inside_of_tars_and_tables_formats_are_known(
    kind: str, songs: Path, tmp_path: Path
) -> None:
    data = (songs / "wav.wav").read_bytes()
    (tmp_path / "in").mkdir()
    if kind == "webdataset":
        put(f"{tmp_path}/in/x.tar", tar_of([("a.wav", data), ("b.WAV", data)]))
    else:
        audio = pa.StructArray.from_arrays([[data] * 2, ["a.wav", "b.WAV"]], ["bytes", "path"])
        pq.write_table(pa.table({"audio": audio}), tmp_path / "in/x.parquet", use_dictionary=False)
    options = {"source": f"{tmp_path}/in", "source_type": kind, "out": f"{tmp_path}/out"}
    options["probe"] = False
    value = forecast(load_config(None, {**options, "device": "cpu"}), calibrated=False)
    assert value.formats == {"wav": 2}
    # By the bytes of CD audio: half the rate and half the channels have a quarter of them.
    assert value.hours * 3600 == pytest.approx(2 * 61 / 4, rel=0.01)


def test_the_command(songs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = tmp_path / "store"
    args = (songs, store, "--unit-seconds", 61, "--shard-size", "8MB", "--probe")
    result = runs.call(capsys, "plan", *args, "--json", "--no-calibrate")
    assert result.code == 0, result.err
    value = runs.outcome(result)
    assert (value["items"], value["units"]) == (5, 5)
    assert value["calibration"] is None
    complete = Forecast(**{**value, "calibration": None, "extension": None, "committed": 5})
    assert show.forecast(complete).endswith(f"plan saved to {store}; every unit is committed")
    first = {path: path.read_bytes() for path in (store / "plan").iterdir()}
    result = runs.call(capsys, "plan", *args, "--no-calibrate")
    assert "run `latentmill encode` with the same options to start" in result.out
    assert {path: path.read_bytes() for path in (store / "plan").iterdir()} == first
    refused = runs.call(capsys, "plan", songs, store, "--unit-seconds", 30)
    assert refused.code == 5
    assert refused.err.startswith("latentmill: --unit-seconds changed: ")
    plan_ = load(Storage(str(store)))
    assert plan_ is not None
    assert set(iter_keys(Storage(str(store)), plan_)) == set(FORMATS)
    assert [len(read_items(Storage(str(store)), unit)) for unit in plan_.units] == [1] * 5


def a_missing_shard(songs: Path, store: Path) -> dict[str, Any]:
    del songs
    (store / "shards" / "000001.parquet").unlink()
    return {}


def a_truncated_shard(songs: Path, store: Path) -> dict[str, Any]:
    del songs
    os.truncate(store / "shards" / "000001.parquet", 100)
    return {}


def a_changed_file(songs: Path, store: Path) -> dict[str, Any]:
    del store
    soundfile.write(songs / "album 1" / "song 01.wav", np.zeros(44100 * 2), 44100)
    return {"extend": True, "retry_changed": True}


def a_failed_item(songs: Path, store: Path) -> dict[str, Any]:
    a_missing_shard(songs, store)
    spoil(songs / "album 1" / "song 01.wav")
    encode(songs, store)
    return {"retry_failed": True}


def a_kept_item(songs: Path, store: Path) -> dict[str, Any]:
    spoil(songs / "album 1" / "song 01.wav")
    assert encode(songs, store, extend=True, retry_changed=True).kept
    return {"retry_failed": True}


@pytest.mark.parametrize(
    "change", [a_missing_shard, a_truncated_shard, a_changed_file, a_failed_item, a_kept_item]
)
@pytest.mark.usefixtures("inline")
def test_units_that_encode_encodes_again_are_not_counted_as_committed(
    change: Callable[[Path, Path], dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("latentmill.run.forecast.measure", lambda *_: 10.0)
    songs, store = runs.write_songs(tmp_path / "songs", 3), tmp_path / "store"
    encode(songs, store)
    options = change(songs, store)
    given = {"source": str(songs), "out": str(store), "device": "cpu", "unit_seconds": 0.01}
    given |= {"model_options": {"hop": 64, "sample_rate": 44100}, "workers": 1, **options}
    value = forecast(load_config(None, given))
    frozen = load(Storage(str(store)))
    assert frozen is not None
    assert (value.units, value.committed) == (3, 2)
    assert value.run_seconds == pytest.approx(frozen.units[1].seconds / 10)
    assert "2 of them committed" in show.forecast(value)
    assert "every unit is committed" not in show.forecast(value)
    assert encode(songs, store, **options).resumed_units == value.committed


def test_changed_files_change_the_hours_and_the_sizes(tmp_path: Path) -> None:
    """Their headers are read, as those of new files."""
    songs = tmp_path / "songs"
    songs.mkdir()
    for name in ("a", "b"):
        soundfile.write(songs / f"{name}.wav", np.zeros(8000, np.int16), 8000)
    options = {"source": str(songs), "out": str(tmp_path / "store"), "device": "cpu"}
    assert forecast(load_config(None, options), calibrated=False).hours == 2 / 3600
    (songs / "b.wav").unlink()
    soundfile.write(songs / "b.flac", np.zeros(800_000, np.int16), 8000)
    config = load_config(None, {**options, "extend": True, "retry_changed": True})
    value = forecast(config, calibrated=False)
    assert value.extension is not None
    assert value.extension.changed_keys == ("b",)
    assert value.hours == pytest.approx(101 / 3600)
    assert (value.estimated_items, value.estimated_hours) == (0, 0.0)
    assert value.source_bytes == sum(path.stat().st_size for path in songs.iterdir())
    assert value.formats == {"wav": 1, "flac": 1}
    assert value.latent_bytes == pytest.approx(101 * 44100 * 2, rel=1e-3)
    assert forecast(load_config(None, options), calibrated=False).hours == value.hours


def test_plan_has_the_options_of_encode() -> None:
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]

    def options(name: str) -> set[str]:
        context = typer.Context(commands[name])
        return {parameter.name for parameter in commands[name].get_params(context)}

    assert {"source", "out", "load_threads"} < options("encode")
    assert options("plan") == options("encode") | {"calibrate"}


def test_lengths_of_more_files_than_that_are_guessed(
    songs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planning, "PROBED_BY_DEFAULT", 4)
    options = {"source": str(songs), "out": str(tmp_path / "s"), "device": "cpu"}
    assert forecast(load_config(None, options), calibrated=False).estimated_items == 5


def test_a_rough_length_serves_planning_alone(tmp_path: Path) -> None:
    """A container in milliseconds: better than a guess by size, and no filter relies on it."""
    put(f"{tmp_path}/a.flv", encoded("flv"))
    items = list(FolderSource(str(tmp_path), ("flv",)).items())
    (item,) = probed(items)
    assert item.seconds is None
    assert item.estimate == pytest.approx(2.0, abs=0.1)
    table = draft_table([item])
    assert table["micros"].to_pylist() == [pytest.approx(2e6, abs=1e5)]
    assert table["seconds"].to_pylist() == [None]


def test_members_of_a_local_tar_are_measured_by_their_ends(
    songs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probe, "ENDS", 20_000)
    members = [(f"{name}.{name}", (songs / f"{name}.{name}").read_bytes()) for name in FORMATS]
    put(f"{tmp_path}/in.tar", tar_of(members))
    options = {"source": f"{tmp_path}/in.tar", "out": f"{tmp_path}/out", "device": "cpu"}
    value = forecast(load_config(None, options), calibrated=False)
    assert value.hours * 3600 == pytest.approx(5 * 61, abs=0.2)


@pytest.mark.parametrize("batch_size", [1, 16])
def test_a_forecast_has_the_share_of_audio_in_long_batches(tmp_path: Path, batch_size: int) -> None:
    """Chunks have 10 s: full batches of one are short, and 30 clips of 2 s make a long one."""
    clips = tmp_path / "clips"
    clips.mkdir()
    for number in range(30):
        soundfile.write(clips / f"{number}.flac", np.zeros(2 * 8000, np.float32), 8000)
    soundfile.write(clips / "other.flac", np.zeros(3 * 8000, np.float32), 8000)
    options = {"source": str(clips), "out": str(tmp_path / "s"), "device": "cpu"}
    config = load_config(None, {**options, "batch_size": batch_size})
    value = forecast(config, calibrated=False)
    assert value.gpu_batch_size == batch_size
    assert value.long_batches == pytest.approx(0 if batch_size == 1 else 60 / 63, abs=0.02)
    text = f"{value.long_batches:.0%} of the audio in batches of 50 s or more, with {batch_size}"
    assert text in show.forecast(value)
