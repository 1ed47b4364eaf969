"""What users meet in the first ten minutes: nothing lost, nothing unsaid."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile

import latentmill as lm
from latentmill.cli.app import app
from latentmill.errors import ITEMS_FAILED_EXIT_CODE, ConfigError, SourceError, StoreError

RATE = 44100


def write(path: Path, seconds: float) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    samples = np.random.default_rng(len(path.name)).standard_normal(round(seconds * RATE)) * 0.1
    soundfile.write(path, samples, RATE, "FLOAT")


@pytest.fixture
def songs(tmp_path: Path) -> Path:
    for name, seconds in (("long", 2.0), ("short", 1.0)):
        write(tmp_path / "songs" / f"{name}.wav", seconds)
    (tmp_path / "songs" / "cover.jpg").write_bytes(b"no audio")
    return tmp_path / "songs"


@pytest.fixture
def store(songs: Path, tmp_path: Path, inline: None) -> Path:
    lm.encode(str(songs), str(tmp_path / "out"), threads=1, dtype="float32")
    return tmp_path / "out"


def run(*arguments: object) -> None:
    app([str(argument) for argument in arguments], standalone_mode=False)


def test_a_recording_is_not_lost_to_its_own_copy(store: Path, songs: Path, tmp_path: Path) -> None:
    before = (songs / "long.wav").read_bytes()
    for options in ([], ["--overwrite"]):
        with pytest.raises(ConfigError, match="is inside the source"):
            run("decode", store, "long", "-o", songs, *options)
    run("decode", store, "long", "-o", tmp_path / "listen")
    with pytest.raises(ConfigError, match="--overwrite"):
        run("decode", store, "long", "-o", tmp_path / "listen")
    run("decode", store, "long", "-o", tmp_path / "listen", "--overwrite")
    assert (songs / "long.wav").read_bytes() == before


def test_nor_through_a_link_or_beside_a_manifest(songs: Path, tmp_path: Path, inline: None) -> None:
    before = (songs / "long.wav").read_bytes()
    (tmp_path / "link").symlink_to(songs)
    (songs / "list.csv").write_text("path\nlong.wav\n")
    for source in (tmp_path / "link", songs / "list.csv"):
        store = tmp_path / f"store of {source.name}"
        lm.encode(str(source), str(store), threads=1)
        for option in ("--overwrite", "--skip-existing"):
            with pytest.raises(ConfigError, match=r"is inside the source|is source audio of"):
                run("decode", store, "long", "-o", songs, option)
        with pytest.raises(ConfigError, match=r"is inside the source|is source audio of"):
            run("mix", store, "long", "-o", songs / "long.wav", "--overwrite")
        run("mix", store, "long", "-o", tmp_path / f"{source.stem}.wav", "--overwrite")
    assert (songs / "long.wav").read_bytes() == before


def test_a_damaged_record_does_not_keep_the_others_from_being_decoded(
    songs: Path, tmp_path: Path, inline: None
) -> None:
    """Also if the source is a manifest, of which an existing output could be source audio."""
    (songs / "list.csv").write_text("path\nlong.wav\n")
    lm.encode(str(songs / "list.csv"), str(tmp_path / "out"), threads=1)
    run("decode", tmp_path / "out", "long", "-o", tmp_path / "heard")
    (shard,) = (tmp_path / "out" / "shards").iterdir()
    shard.write_bytes(bytes(shard.stat().st_size))
    code = app(
        ["decode", str(tmp_path / "out"), "long", "-o", str(tmp_path / "heard"), "--overwrite"],
        standalone_mode=False,
    )
    assert code == ITEMS_FAILED_EXIT_CODE
    run("decode", tmp_path / "out", "long", "-o", tmp_path / "heard", "--skip-existing")


@pytest.mark.parametrize("name", ["pipe.wav", "link to pipe.wav"])
def test_only_regular_files_are_replaced(store: Path, tmp_path: Path, name: str) -> None:
    os.mkfifo(tmp_path / "pipe.wav")
    (tmp_path / "link to pipe.wav").symlink_to("pipe.wav")
    with pytest.raises(ConfigError, match="not a regular file"):
        run("mix", store, "long", "-o", tmp_path / name, "--overwrite")
    assert (tmp_path / "pipe.wav").is_fifo()


@pytest.mark.parametrize(("length", "seconds"), [("shortest", 1.0), ("longest", 2.0)])
def test_records_of_two_lengths_are_mixed(
    store: Path, tmp_path: Path, length: str, seconds: float
) -> None:
    file = tmp_path / "mix.wav"
    with pytest.raises(ConfigError, match="add --length shortest"):
        run("mix", store, "long", "short:0.5", "-o", file)
    run("mix", store, "long", "short:0.5", "-o", file, "--length", length)
    mixed, rate = soundfile.read(file)
    parts = [soundfile.read(tmp_path / "songs" / f"{name}.wav")[0] for name in ("long", "short")]
    whole = np.zeros(2 * RATE)
    whole[: len(parts[0])] += parts[0]
    whole[: len(parts[1])] += 0.5 * parts[1]
    assert (len(mixed), rate) == (seconds * RATE, RATE)
    inside = len(mixed) - (2048 if length == "shortest" else 0)  # a cut frame ends in its overlap
    np.testing.assert_allclose(mixed[:inside], whole[:inside], atol=1e-4)


def test_files_that_are_no_items_are_counted(
    store: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run("status", store)
    assert "ignored (not audio): 1 .jpg" in capsys.readouterr().out
    run("status", store, "--json")
    assert json.loads(capsys.readouterr().out)["ignored"] == {".jpg": 1}


def test_failed_items_can_be_mended(songs: Path, tmp_path: Path, inline: None) -> None:
    (songs / "broken.wav").write_bytes(b"RIFF")
    options = {"threads": 1, "unit_seconds": 0.5}
    first = lm.encode(str(songs), str(tmp_path / "out"), **options)
    assert [key for key, _ in first.failures] == ["broken"]
    kept = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out/commits").iterdir()}
    write(songs / "broken.wav", 1.5)
    assert lm.encode(str(songs), str(tmp_path / "out"), **options).resumed_units == first.units
    again = lm.encode(str(songs), str(tmp_path / "out"), retry_failed=True, **options)
    assert again.resumed_units == first.units - 1
    assert (again.info.encoded, again.failures) == (3, ())
    now = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out/commits").iterdir()}
    assert {name: now[name] for name in kept} == kept  # a retried unit gets a new name
    (new,) = set(now) - set(kept)
    assert new.endswith(".r1.json")


@pytest.mark.parametrize("name", ["dataset.json", "origin.npy", "index.arrow"])
def test_a_folder_with_someone_s_files_is_refused(songs: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).write_text("mine")
    with pytest.raises(StoreError, match=name):
        lm.encode(str(songs), str(tmp_path / "out"))
    assert (tmp_path / "out" / name).read_text() == "mine"
    assert not (tmp_path / "out" / "plan").exists()


def test_other_extensions_are_another_run(store: Path, songs: Path) -> None:
    with pytest.raises(StoreError, match=r"^--extensions changed: .* with wav .* more, .* mp3\."):
        lm.encode(str(songs), str(store), dtype="float32", extensions=("mp3",))


@pytest.mark.slow
def test_two_first_runs_cannot_plan_one_store(songs: Path, tmp_path: Path) -> None:
    """Both start at once: one makes the store, the other one is refused or finds it its own."""
    script = (
        "import sys, latentmill as lm\n"
        "try:\n"
        "    lm.encode(sys.argv[1], sys.argv[2], dtype=sys.argv[3], threads=1)\n"
        "except lm.LatentmillError as error:\n"
        "    sys.exit(error.exit_code)\n"
    )
    command = [sys.executable, "-c", script, songs, tmp_path / "out"]
    runs = [subprocess.Popen([*command, dtype]) for dtype in ("float16", "float32")]
    codes = sorted(one.wait() for one in runs)
    assert codes == [0, StoreError.exit_code]
    store = lm.open(str(tmp_path / "out"))
    assert store.info.dtype == store.plan.fingerprint["settings"]["dtype"]
    assert next(iter(store)).latent.dtype == store.info.dtype


def test_a_run_that_is_refused_leaves_no_folder(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(SourceError):
        lm.encode(str(tmp_path / "empty"), str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_a_chained_url_is_refused(tmp_path: Path) -> None:
    shutil.make_archive(str(tmp_path / "songs"), "zip", tmp_path)
    with pytest.raises(SourceError, match="chained"):
        lm.encode(f"zip://::{tmp_path}/songs.zip", str(tmp_path / "out"))
