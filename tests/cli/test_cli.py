"""The commands, with and without --json, on a store that a real run has made."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import typer.main

from latentmill import __version__
from latentmill.cli import app as cli
from latentmill.cli import entry
from latentmill.cli import read as cli_read
from latentmill.decoding.files import file_name
from latentmill.run.run import encode
from latentmill.store.store import LatentStore
from latentmill.store.verify import VerifyReport, verify
from support import runs
from support.in_process import in_process

COMMANDS = typer.main.get_command(cli.app).commands.values()  # type: ignore[attr-defined]
Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def songs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three songs of one length, a shorter one, and one that is broken."""
    folder = tmp_path_factory.mktemp("songs")
    for number in (0, 7, 14):
        runs.write_songs(folder, 1, first=number)
    runs.write_songs(folder, 1, seconds=0.6, first=21)
    (folder / "broken.wav").write_bytes(b"RIFF")
    return folder


@pytest.fixture(scope="module")
def store(songs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Their store; leave it unchanged."""
    out = tmp_path_factory.mktemp("store") / "latents"
    with in_process():
        encode(str(songs), str(out), device="cpu", threads=1)
    return out


def test_encode(capsys: Capture, songs: Path, ray_session: Path, tmp_path: Path) -> None:
    config = tmp_path / "run.yaml"
    config.write_text(f"source: {songs}\nout: nowhere\ndevice: cpu\nmodel: mdct\nthreads: 1\n")
    args = ["encode", "--config", config, songs, tmp_path / "new" / "store", "--workers", 1]
    result = runs.call(capsys, *args)
    assert result.code == 3  # an item failed
    assert result.out.splitlines()[0].startswith(
        f"{tmp_path}/new/store: 4 encoded, 0 skipped, 1 failed of 5 items"
    )
    assert "failed: broken: " in result.out
    assert "\x1b" not in result.err  # no terminal: plain lines
    assert result.err.splitlines()[-1].startswith("5/5 items, 0.001 of 0.001 h of audio, ")
    again = runs.call(capsys, *args, "--json")
    assert (again.code, again.err) == (3, "")
    parsed = runs.outcome(again)
    assert parsed["exit_code"] == 3
    assert parsed["resumed_units"] == parsed["units"] == 1
    assert [key for key, _ in parsed["failures"]] == ["broken"]


def test_status_and_info(capsys: Capture, store: Path) -> None:
    text = runs.call(capsys, "status", store)
    assert (text.code, text.err) == (0, "")
    assert text.out.splitlines()[:2] == [f"{store}: complete", "units     1 of 1 committed"]
    assert "items     4 encoded, 0 skipped, 1 failed of 5" in text.out
    status = runs.outcome(runs.call(capsys, "status", store, "--json"))
    assert (status["complete"], status["encoded"], status["failed"]) == (True, 4, 1)
    text = runs.call(capsys, "info", store)
    assert text.code == 0
    assert "mdct, 44100 Hz" in text.out
    info = runs.outcome(runs.call(capsys, "info", store, "--json"))
    assert info == json.loads((store / "dataset.json").read_text())


def test_status_of_a_store_that_is_not_complete(
    capsys: Capture, store: Path, tmp_path: Path
) -> None:
    copy = shutil.copytree(store, tmp_path / "copy")
    (copy / "commits" / "000000.json").unlink()
    (copy / "dataset.json").unlink()
    text = runs.call(capsys, "status", copy)
    assert text.code == 0
    assert "not complete; to resume, run the same encode command again" in text.out
    assert runs.outcome(runs.call(capsys, "status", copy, "--json"))["complete"] is False
    assert runs.call(capsys, "verify", copy).code == 8


def test_verify(capsys: Capture, store: Path, tmp_path: Path) -> None:
    text = runs.call(capsys, "verify", store, "--decode", 2)
    assert (text.code, text.err) == (0, "")
    assert "1 of 1 unit, 4 records of 5 items: no faults" in text.out
    assert text.out.count("decoded ") == 2
    report = runs.outcome(runs.call(capsys, "verify", store, "--decode", 1, "--json"))
    assert report["faults"] == []
    assert report["decoded"][0]["snr_db"] > 50

    copy = shutil.copytree(store, tmp_path / "copy")
    shard = copy / "shards" / "000000.parquet"
    content = bytearray(shard.read_bytes())
    content[len(content) // 3] ^= 1
    shard.write_bytes(content)
    damaged = runs.call(capsys, "verify", copy, "--json")
    assert damaged.code == 8
    assert any("does not match" in fault for fault in runs.outcome(damaged)["faults"])
    assert damaged.err.startswith(f"latentmill: found 1 fault in {copy}; first: ")


def test_verify_can_clean_up_when_it_is_interrupted(
    capsys: Capture, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise a signal ends the process at once, and the files that it downloaded stay."""
    handlers = []

    def verified(opened: LatentStore, *, decode: int, remote_sources: bool) -> VerifyReport:
        handlers.append(signal.getsignal(signal.SIGTERM))
        return verify(opened, decode=decode, remote_sources=remote_sources)

    monkeypatch.setattr("latentmill.store.verify.verify", verified)
    assert runs.call(capsys, "verify", store).code == 0
    assert handlers == [entry._raise_interrupt]


def test_sync(capsys: Capture, store: Path, tmp_path: Path) -> None:
    count, copy = sum(path.is_file() for path in store.rglob("*")) - 1, tmp_path / "copy"
    planned = runs.call(capsys, "sync", store, copy, "--dry-run")
    assert planned.out.startswith(f"{copy}: would copy {count} files (")
    assert planned.out.splitlines()[-1] == "  dataset.json"
    assert not copy.exists()
    text = runs.call(capsys, "sync", store, copy)
    assert (text.code, text.err) == (0, "")
    assert re.fullmatch(rf"{copy}: copied {count} files \(.* [kM]B\); 0 are the same\n", text.out)
    again = runs.outcome(runs.call(capsys, "sync", store, copy, "--json"))
    assert (again["copied"], again["kept"], again["bytes"]) == ([], count, 0)
    refused = runs.call(capsys, "sync", store, tmp_path)
    assert (refused.code, refused.out) == (2, "")


def test_decode_to_where_nothing_can_be_written(
    capsys: Capture, store: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    result = runs.call(capsys, "decode", store, "album 0/song 00", "-o", tmp_path / "file")
    assert result.code == 6
    assert result.err.startswith(f"latentmill: Cannot write {tmp_path}/file/album 0/song 00.wav: ")
    result = runs.call(capsys, "mix", store, "album 0/song 00", "-o", tmp_path / "mix.mp3")
    assert (result.code, result.err) == (
        2,
        f"latentmill: Cannot write {tmp_path}/mix.mp3: use a file name that ends in .wav or "
        ".flac.\n",
    )


def test_mix(capsys: Capture, store: Path, songs: Path, tmp_path: Path) -> None:
    file = tmp_path / "new" / "mix.wav"
    parts = ["album 0/song 00", "album 1/song 07:-0.5"]
    result = runs.call(capsys, "mix", store, *parts, "-o", file)
    assert (result.code, result.out) == (0, f"{file}\n")
    first, second = (
        soundfile.read(songs / name, dtype="float32")[0]
        for name in ("album 0/song 00.wav", "album 1/song 07.wav")
    )
    np.testing.assert_allclose(soundfile.read(file)[0], first - 0.5 * second, atol=3e-3)


def test_flac(capsys: Capture, store: Path, songs: Path, tmp_path: Path) -> None:
    key = "album 1/song 07"
    result = runs.call(capsys, "decode", store, key, "-o", tmp_path, "--format", "flac", "--json")
    assert (result.code, result.err) == (0, "")
    file = tmp_path / f"{key}.flac"
    assert runs.outcome(result)["files"] == [str(file)]
    assert soundfile.info(file).subtype == "PCM_24"
    source, _ = soundfile.read(songs / f"{key}.wav", dtype="float32")
    np.testing.assert_allclose(soundfile.read(file)[0], source, atol=2e-3)
    loud = runs.call(capsys, "mix", store, f"{key}:5", "-o", tmp_path / "loud.flac")
    assert loud.code == 0
    assert "samples (peak +" in loud.err
    assert np.abs(soundfile.read(tmp_path / "loud.flac")[0]).max() <= 1
    wrong = runs.call(capsys, "decode", store, key, "-o", tmp_path, "--format", "mp3")
    assert (wrong.code, wrong.err) == (2, "latentmill: invalid --format 'mp3': use wav or flac.\n")


def test_mix_of_records_of_other_lengths(
    capsys: Capture, store: Path, songs: Path, tmp_path: Path
) -> None:
    keys = ["album 0/song 00", "album 0/song 21"]
    long, short = (soundfile.read(songs / f"{key}.wav", dtype="float32")[0] for key in keys)
    for length, samples in (("longest", len(long)), ("shortest", len(short))):
        file = tmp_path / f"{length}.wav"
        result = runs.call(capsys, "mix", store, *keys, "-o", file, "--length", length)
        assert (result.code, result.err) == (0, "")
        audio = soundfile.read(file)[0]
        expected = long[:samples].copy()
        expected[: len(short)] += short
        assert len(audio) == samples
        # A cut latent lacks the frame that ends its last hop.
        np.testing.assert_allclose(audio[:-512], expected[:-512], atol=4e-3)


def test_mixes_that_make_no_sense(capsys: Capture, store: Path, tmp_path: Path) -> None:
    file = tmp_path / "mix.wav"
    for parts, sentence in [
        (["album 1/song 8"], "did you mean album 1/song 07?"),
        (["album 0/song 00:loud"], "invalid gain 'loud' of album 0/song 00"),
        (["album 0/song 00:nan"], "invalid gain 'nan' of album 0/song 00"),
        (["album 0/song 00", "album 0/song 21"], "add --length shortest"),
    ]:
        result = runs.call(capsys, "mix", store, *parts, "-o", file)
        assert (result.code, result.out) == (2, "")
        assert sentence in result.err
        assert len(result.err.splitlines()) == 1
        assert not file.exists()
    assert runs.call(capsys, "decode", store, "zzz", "-o", tmp_path).code == 2


def test_a_gain_in_decibels(capsys: Capture, store: Path, tmp_path: Path) -> None:
    key = "album 0/song 00"
    loud, soft = tmp_path / "loud.wav", tmp_path / "soft.wav"
    assert runs.call(capsys, "mix", store, f"{key}:1", "-o", loud).code == 0
    assert runs.call(capsys, "mix", store, f"{key}:-6.0206dB", "-o", soft).code == 0
    # 20 log10(2) dB is a factor of two; mdct is linear, and its latents are stored as float16.
    np.testing.assert_allclose(soundfile.read(loud)[0], 2 * soundfile.read(soft)[0], atol=1e-5)
    assert [
        cli_read._key_and_gain({"a": None}, f"a:{gain}")[1] for gain in ("+20 dB", "-20DB", "0db")
    ] == [
        pytest.approx(10.0),
        pytest.approx(0.1),
        1.0,
    ]
    for gain in ("dB", "-6dBFS", "99999dB", "infdB"):
        refused = runs.call(capsys, "mix", store, f"{key}:{gain}", "-o", tmp_path / "no.wav")
        assert refused.code == 2
        assert "-6dB" in refused.err


def test_a_key_may_hold_colons() -> None:
    store = {"a:b": None, "a": None}
    assert cli_read._key_and_gain(store, "a:b") == ("a:b", 1.0)
    assert cli_read._key_and_gain(store, "a:b:2") == ("a:b", 2.0)
    assert cli_read._key_and_gain(store, "a:2") == ("a", 2.0)


@pytest.mark.parametrize("key", ["../../x", "/etc/x", "a/../../../x", "./..//x", "..", ""])
def test_a_key_does_not_leave_its_folder(key: str, tmp_path: Path) -> None:
    path = (tmp_path / file_name(key, ".wav")).resolve()
    assert path.is_relative_to(tmp_path)
    assert path.parent.is_relative_to(tmp_path)


def test_models_and_version(capsys: Capture) -> None:
    text = runs.call(capsys, "models")
    assert text.code == 0
    assert {"mdct", "lin-cae"} <= {line.split()[0] for line in text.out.splitlines()}
    listed = json.loads(runs.call(capsys, "models", "--json").out)
    fields = {"name", "description", "requirement", "kind"}
    assert all(set(entry) == fields for entry in listed)
    columns = {
        line.index(one["kind"]) for line, one in zip(text.out.splitlines(), listed, strict=True)
    }
    assert len(columns) == 1, "the kinds are in one column"
    assert runs.call(capsys, "version").out == f"{__version__}\n"
    for command in (("models", "dac:/"), ("encode", "in", "out", "--model", "dac:/")):
        refused = runs.call(capsys, *command, "--revision", "123")
        assert "has no revisions; leave out the option revision" in refused.err
    assert runs.call(capsys, "--version").out == f"{__version__}\n"
    assert runs.call(capsys, "--help").code == 0
    assert runs.call(capsys, "no-such-command").code == 2


@pytest.mark.parametrize("command", ["", *sorted(c.name for c in COMMANDS if c.name)])
def test_every_command_has_the_same_help_and_names_a_store_the_same(
    capsys: Capture, command: str
) -> None:
    words = [command] if command else []
    short, long = (runs.call(capsys, *words, option) for option in ("-h", "--help"))
    assert (short.code, short.err) == (0, "")
    assert short.out == long.out
    assert " OUT" not in short.out


def test_shell_completion_completes_commands_and_options() -> None:
    def completions(words: str) -> list[str]:
        env = {**os.environ, "_LATENTMILL_COMPLETE": "complete_zsh"}
        env |= {"_TYPER_COMPLETE_ARGS": words}
        program = (
            "import sys; sys.argv[0] = 'latentmill'; from latentmill.cli.entry import main; main()"
        )
        done = subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, check=False, env=env
        )
        assert done.stderr == ""
        return re.findall(r'"([a-z-]+)":"', done.stdout)

    assert {"verify", "version"} == set(completions("latentmill ver"))
    assert completions("latentmill decode --over") == ["--overwrite"]


READERS = """
import sys
sys.argv = ["latentmill", "status", {store!r}]
import latentmill
assert "ray" not in sys.modules, "import latentmill"
from latentmill.cli.entry import main
try:
    main()
finally:
    assert "ray" not in sys.modules, "latentmill status"
    latentmill.open({store!r}).decode("album 0/song 00")
    assert "ray" not in sys.modules, "reading"
"""


def test_reading_does_without_ray(store: Path) -> None:
    code = READERS.format(store=str(store))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "complete" in done.stdout
