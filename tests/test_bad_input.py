"""Bad input of every kind: one sentence, its exit code, and nothing committed is lost."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from latentmill.config import load_config
from latentmill.run.prepare import listed, planned, prepare
from support import runs

Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def songs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.write_songs(tmp_path_factory.mktemp("songs"), 3)


def refused(capsys: Capture, code: int, *args: object) -> str:
    """Run a command that must fail; gives its one sentence."""
    result = runs.call(capsys, *args)
    assert (result.code, result.out) == (code, ""), result.err
    lines = result.err.splitlines()
    assert len(lines) == 1, result.err
    assert lines[0].startswith("latentmill: ")
    return lines[0].removeprefix("latentmill: ")


def test_sources_that_cannot_be_used(capsys: Capture, tmp_path: Path, songs: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "notes.txt").write_text("no audio")
    file = next(songs.rglob("*.wav"))
    out = tmp_path / "out"
    for source, sentence in [
        (tmp_path / "empty", "is empty: check the path"),
        (tmp_path / "notes", "contains no audio files"),
        (tmp_path / "missing", "does not exist"),
        (file, "is a file: use its folder"),
        ("nosuch://bucket/songs", "cannot be opened"),
    ]:
        assert sentence in refused(capsys, 4, "encode", source, out)
        assert not out.exists()


def test_outputs_that_cannot_be_used(capsys: Capture, tmp_path: Path, songs: Path) -> None:
    file = tmp_path / "file"
    file.write_text("precious")
    assert "is inside the source" in refused(capsys, 2, "encode", songs, songs / "latents")
    assert "is inside the source" in refused(capsys, 2, "encode", songs, songs)
    assert "is a file: choose a folder" in refused(capsys, 2, "encode", songs, file)
    assert "Not a directory" in refused(capsys, 6, "encode", songs, file / "below")
    # Even root may not write here.
    assert "Cannot write /proc/latents" in refused(capsys, 6, "encode", songs, "/proc/latents")
    assert file.read_text() == "precious"
    assert sorted(path.suffix for path in songs.rglob("*") if path.is_file()) == [".wav"] * 3


def test_a_ray_job_s_own_folder_is_no_place_for_a_store(
    capsys: Capture, tmp_path: Path, songs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    assert "use an absolute path" in refused(capsys, 2, "encode", songs, "latents")
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def nobody() -> Iterator[Path]:
    """A folder that everyone may list, and for root: no more rights than anyone."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        before = os.geteuid()
        if before == 0:
            os.seteuid(65534)
        try:
            yield Path(name)
        finally:
            os.seteuid(before)


def test_no_permission(capsys: Capture, songs: Path, nobody: Path) -> None:
    closed, open_, out = nobody / "closed", nobody / "open", nobody / "out"
    with as_owner(nobody):
        shutil.copytree(songs, open_)
        shutil.copytree(songs, closed)
        open_.chmod(0o755)
        closed.chmod(0)
        out.mkdir(mode=0o555)
    try:
        assert "Permission denied" in refused(capsys, 4, "encode", closed, nobody / "new")
        assert "Permission denied" in refused(capsys, 6, "encode", open_, out)
        with as_owner(nobody):
            store = frozen(open_, nobody / "store")
        assert "Permission denied" in refused(capsys, 6, "encode", open_, store)
    finally:
        with as_owner(nobody):
            closed.chmod(0o700)
            out.chmod(0o700)


def frozen(songs: Path, store: Path) -> Path:
    """A store with a plan and no commits."""
    prepared = prepare(load_config(None, {"source": str(songs), "out": str(store)}))
    planned(prepared, listed(prepared))
    return store


@contextmanager
def as_owner(folder: Path) -> Iterator[None]:
    """With the rights of a folder's owner, which root may take."""
    before = os.geteuid()
    os.seteuid(folder.stat().st_uid)
    try:
        yield
    finally:
        os.seteuid(before)


@pytest.mark.parametrize(
    ("options", "code", "sentence"),
    [
        (["--model", "lin-cea"], 7, "did you mean lin-cae?"),
        (["--model", "python:no.such:factory"], 7, "cannot import no.such:factory"),
        (["--model-option", "hop=7"], 7, "option hop must be even"),
        (["--model-option", "hops=8"], 7, "did you mean hop?"),
        (["--model-option", "hop"], 2, "expected NAME=VALUE"),
        (["--model-option", "hop=[1"], 2, "not valid YAML"),
        (["--format", "zip"], 2, "invalid --format 'zip'"),
        (["--dtype", "int8"], 2, "invalid --dtype 'int8': it must be 'float16' or 'float32'"),
        (["--overlap", "0.9"], 2, "invalid --overlap 0.9: it must be less than or equal to 0.5"),
        (["--chunk-seconds", "-1"], 2, "invalid --chunk-seconds -1.0: it must be greater than 0"),
        (["--chunk-seconds", "abc"], 2, "invalid --chunk-seconds 'abc': expected a number."),
        (["--workers", "0"], 2, "invalid --workers 0"),
        (["--shard-size", "big"], 2, "invalid --shard-size 'big': expected a size such as 512MiB"),
        (["--retry-changed"], 2, "--retry-changed needs --extend"),
        (["--refresh-metadata"], 2, "--refresh-metadata needs --extend"),
        (["--start-column", "x"], 2, "--start-column has no effect on a source of type folder"),
        (["--group-by", "x"], 2, "invalid --group-by 'x': it must contain (?P<group>...)"),
        (["--device", "tpu9"], 2, "use auto, cpu, cuda or cuda:N"),
        (["--no-such-option"], 2, "unknown option --no-such-option"),
        (["--config", "no/such.yaml"], 2, "Cannot read config no/such.yaml"),
    ],
)
def test_options(
    capsys: Capture,
    tmp_path: Path,
    songs: Path,
    options: list[str],
    code: int,
    sentence: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert sentence in refused(capsys, code, "encode", songs, tmp_path / "out", *options)
    assert list(tmp_path.iterdir()) == []


def test_config_files(capsys: Capture, tmp_path: Path, songs: Path) -> None:
    config = tmp_path / "run.yaml"
    for text, sentence in [
        (f"source: {songs}\nout: {tmp_path}/out\ncolour: blue\n", "unknown setting colour in"),
        ("source: [", "is not valid YAML"),
        ("just words", "must contain lines of the form `setting: value`"),
        (f"out: {tmp_path}/out\n", "SOURCE is missing"),
    ]:
        config.write_text(text)
        assert sentence in refused(capsys, 2, "encode", "--config", config)


def test_stores_that_cannot_be_read(capsys: Capture, tmp_path: Path, songs: Path) -> None:
    (tmp_path / "empty").mkdir()
    for command in (["status"], ["info"], ["verify"], ["decode"], ["mix"]):
        more = ["key", "-o", tmp_path / "x.wav"] if command[0] in ("decode", "mix") else []
        for folder in ("empty", "missing"):
            sentence = refused(capsys, 5, *command, tmp_path / folder, *more)
            assert "is not a latentmill store" in sentence


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 3 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(disk)]
    try:
        done = subprocess.run(mount, capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        done = False
    if not done:
        pytest.skip("needs the right to mount a tmpfs")
    yield disk
    subprocess.run(["umount", "--lazy", str(disk)], check=True)


@pytest.mark.usefixtures("inline")
@pytest.mark.parametrize("format_name", ["parquet", "webdataset"])
def test_a_full_disk_stops_the_run_and_loses_nothing(
    capsys: Capture, small_disk: Path, tmp_path: Path, format_name: str
) -> None:
    songs = runs.write_songs(tmp_path / "songs", 8, seconds=6.0)  # 4.3 MB of latents
    store = small_disk / "store"
    args = ["encode", songs, store, "--unit-seconds", "10", "--format", format_name]
    args += ["--device", "cpu", "--workers", "1", "--threads", "1"]
    result = runs.call(capsys, *args)
    assert result.code == 6, result.err
    assert result.out == ""
    sentence = result.err.splitlines()[-1]
    assert sentence.startswith(f"latentmill: Cannot write {store}/")
    assert sentence.endswith(
        "No space left on device; free some space, then run the same command again."
    )
    kept = runs.commits(store)
    assert 0 < len(kept) < 8
    # A shard may be there whose commit found no more room: it does not count.
    assert {path.stem for path in store.glob("shards/*")} >= {
        name.removesuffix(".json") for name in kept
    }
    assert not (store / "tmp").exists()
    status = runs.call(capsys, "status", store, "--json")
    assert runs.outcome(status)["encoded"] == len(kept)

    subprocess.run(["mount", "-o", "remount,size=30m", str(small_disk)], check=True)
    result = runs.call(capsys, *args)
    assert result.code == 0, result.err
    assert kept.items() <= runs.commits(store).items()
    runs.assert_whole(store)
