"""The command `decode`: which records it decodes, what fails, and how it is resumed."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

import latentmill
from latentmill.cli import decode as cli_decode
from latentmill.cli import entry
from latentmill.cli.entry import INTERRUPTED_EXIT_CODE
from latentmill.decoding.files import file_name
from latentmill.errors import ConfigError
from latentmill.run.run import encode
from latentmill.store.store import LatentStore
from support import runs
from support.in_process import in_process

Capture = pytest.CaptureFixture[str]
SHORT = "album 0/song 21"


@pytest.fixture(scope="module")
def songs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three songs of one length, and a shorter one."""
    folder = tmp_path_factory.mktemp("songs")
    for number in (0, 7, 14):
        runs.write_songs(folder, 1, first=number)
    return runs.write_songs(folder, 1, seconds=0.6, first=21)


@pytest.fixture(scope="module")
def store(songs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Their store, with a shard for each; leave it unchanged."""
    out = tmp_path_factory.mktemp("store") / "latents"
    with in_process():
        encode(str(songs), str(out), device="cpu", threads=1, unit_seconds=0.1)
    return out


@pytest.fixture
def copy(store: Path, tmp_path: Path) -> Path:
    """A copy of the store, to be damaged."""
    return Path(shutil.copytree(store, tmp_path / "copy"))


def audio_in(folder: Path) -> dict[str, bytes]:
    """The samples of the audio files in a folder, by key."""
    return {  # not the files' bytes: a FLOAT file has the time at which it was written
        file.relative_to(folder).with_suffix("").as_posix(): soundfile.read(file)[0].tobytes()
        for file in folder.rglob("*")
        if file.is_file()
    }


def keys_of(store: Path) -> list[str]:
    return list(latentmill.open(str(store)).keys())


def test_decode_makes_the_folder_and_gives_the_audio(
    capsys: Capture, store: Path, songs: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "not" / "there"
    keys = ["album 0/song 00", "album 1/song 07"]
    result = runs.call(capsys, "decode", store, *keys, "-o", folder, "--json")
    assert (result.code, result.err) == (0, "")
    files = [folder / f"{key}.wav" for key in keys]
    assert runs.outcome(result) == {
        "files": [str(file) for file in files],
        "skipped": [],
        "failures": [],
    }
    for key, file in zip(keys, files, strict=True):
        source, _ = soundfile.read(songs / f"{key}.wav", dtype="float32")
        decoded, rate = soundfile.read(file, dtype="float32")
        assert rate == 44100
        assert decoded.shape == source.shape
        np.testing.assert_allclose(decoded, source, atol=2e-3)


def test_decode_takes_globs_and_all(capsys: Capture, store: Path, tmp_path: Path) -> None:
    def decoded(name: str, *keys: str) -> list[str]:
        folder = tmp_path / name
        result = runs.call(capsys, "decode", store, *keys, "-o", folder)
        assert (result.code, result.err) == (0, "")
        return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.wav"))

    everything = sorted(f"{record.key}.wav" for record in latentmill.open(str(store)))
    assert len(everything) == 4
    assert decoded("all", "--all") == decoded("star", "*") == everything
    assert decoded("two", "album ?/song 0*", "album 0/song 00") == [
        "album 0/song 00.wav",
        "album 1/song 07.wav",
    ]
    for keys in (["no/*"], [], ["--all", "album 0/song 00"]):
        refused = runs.call(capsys, "decode", store, *keys, "-o", tmp_path / "refused")
        assert refused.code == 2
        assert "--all" in refused.err
        assert not (tmp_path / "refused").exists()


def test_two_records_are_not_written_to_one_file() -> None:
    def check(*keys: str) -> None:
        cli_decode._check_distinct({key: Path(file_name(key, ".wav")) for key in keys})

    with pytest.raises(ConfigError, match="both"):
        check("a/b", "a/./b")
    with pytest.raises(ConfigError, match=r"is the folder of 'a\.wav/b'"):
        check("a.wav/b", "a")
    check("a/b", "a/../bc", "a")


def test_skip_existing_decodes_only_the_rest(capsys: Capture, store: Path, tmp_path: Path) -> None:
    keys, folder = keys_of(store), tmp_path / "audio"
    assert runs.call(capsys, "decode", store, keys[1], "-o", folder).code == 0
    first = folder / f"{keys[1]}.wav"
    silence = np.zeros(10)
    soundfile.write(first, silence, 44100)
    refused = runs.call(capsys, "decode", store, "--all", "-o", folder)
    assert refused.code == 2
    assert f"{first} exists: choose another output path, or add --skip-existing" in refused.err
    assert list(audio_in(folder)) == [keys[1]]
    result = runs.call(capsys, "decode", store, "--all", "-o", folder, "--skip-existing")
    assert (result.code, result.err) == (0, "")
    assert result.out.splitlines() == [
        *(f"{folder}/{key}.wav" for key in keys if key != keys[1]),
        "skipped 1 existing file, whatever options they were decoded with (--overwrite decodes "
        "them again)",
    ]
    assert runs.call(capsys, "decode", store, "--all", "-o", tmp_path / "whole").code == 0
    assert audio_in(folder) == {**audio_in(tmp_path / "whole"), keys[1]: silence.tobytes()}
    again = runs.call(capsys, "decode", store, "--all", "-o", folder, "--skip-existing", "--json")
    assert (again.code, runs.outcome(again)) == (
        0,
        {"files": [], "skipped": [f"{folder}/{key}.wav" for key in keys], "failures": []},
    )
    both = runs.call(
        capsys, "decode", store, "--all", "-o", folder, "--skip-existing", "--overwrite"
    )
    assert (both.code, len(both.err.splitlines())) == (2, 1)
    wrong = runs.call(capsys, "decode", store, *keys, "zzz", "-o", tmp_path / "no")
    assert wrong.code == 2
    assert not (tmp_path / "no").exists()


def test_an_interrupted_decode_is_resumed(
    capsys: Capture, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The signal comes while the third record is read."""
    keys, folder, read = keys_of(store), tmp_path / "audio", LatentStore.source

    def source(opened: LatentStore, key: str) -> object:
        if key == keys[2]:
            os.kill(os.getpid(), signal.SIGTERM)
        return read(opened, key)

    with monkeypatch.context() as patch:
        patch.setattr(entry, "_interrupted", False)
        patch.setattr(LatentStore, "source", source)
        stopped = runs.call(capsys, "decode", store, "--all", "-o", folder)
    assert (stopped.code, stopped.err) == (
        INTERRUPTED_EXIT_CODE,
        "latentmill: interrupted; add --skip-existing to decode only the rest\n",
    )
    assert sorted(audio_in(folder)) == keys[:2]
    resumed = runs.call(capsys, "decode", store, "--all", "-o", folder, "--skip-existing", "--json")
    assert resumed.code == 0
    assert runs.outcome(resumed)["files"] == [f"{folder}/{key}.wav" for key in keys[2:]]
    assert runs.call(capsys, "decode", store, "--all", "-o", tmp_path / "whole").code == 0
    assert audio_in(folder) == audio_in(tmp_path / "whole")


def test_damaged_and_missing_shards_do_not_stop_the_others(
    capsys: Capture, store: Path, copy: Path, tmp_path: Path
) -> None:
    keys, folder = keys_of(store), tmp_path / "audio"
    runs.damage(latentmill.open(str(copy)), keys[0])
    (copy / latentmill.open(str(copy)).entry(keys[2]).shard).unlink()
    result = runs.call(capsys, "decode", copy, "--all", "-o", folder)
    assert (result.code, result.err) == (3, "")
    written, failed = result.out.splitlines()[:2], result.out.splitlines()[2:]
    assert written == [f"{folder}/{keys[1]}.wav", f"{folder}/{keys[3]}.wav"]
    assert [line.split(": ")[:2] for line in failed] == [
        ["  failed", keys[0]],
        ["  failed", keys[2]],
    ]
    assert "is damaged at record" in failed[0]
    assert "No such file or directory" in failed[1]
    assert runs.call(capsys, "decode", store, "--all", "-o", tmp_path / "whole").code == 0
    whole = audio_in(tmp_path / "whole")
    assert audio_in(folder) == {key: whole[key] for key in (keys[1], keys[3])}
    # As the message says: restore the shards, then decode the rest.
    shutil.copytree(store, copy, dirs_exist_ok=True)
    again = runs.call(capsys, "decode", copy, "--all", "-o", folder, "--skip-existing", "--json")
    assert again.code == 0
    assert len(runs.outcome(again)["skipped"]) == 2  # type: ignore[arg-type]
    assert audio_in(folder) == whole


def test_a_record_that_the_model_cannot_decode(
    capsys: Capture, songs: Path, tmp_path: Path, inline: None
) -> None:
    out, folder = tmp_path / "latents", tmp_path / "audio"
    encode(str(songs), str(out), model="python:support.failing_decoder:build", threads=1)
    untrusted = runs.call(capsys, "decode", out, "--all", "-o", folder)
    assert (untrusted.code, untrusted.out) == (7, "")
    assert not folder.exists()
    options = ("--all", "-o", folder, "--trust-model", "--json")
    result = runs.call(capsys, "decode", out, *options)
    assert (result.code, result.err) == (3, "")
    assert runs.outcome(result)["failures"] == [
        [SHORT, "RuntimeError: Kernel size can't be greater than actual input size"]
    ]
    assert sorted(audio_in(folder)) == [key for key in keys_of(out) if key != SHORT]
    detailed = runs.call(capsys, "decode", out, "-v", SHORT, *options[1:])
    assert detailed.code == 3
    assert "Traceback" in detailed.err


def test_decoding_stops_when_nothing_can_be_written(
    capsys: Capture, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full disk is full for every record; what was decoded stays."""
    keys, replace = keys_of(store), Path.replace

    def full(self: Path, target: Path) -> Path:
        if target.name == f"{Path(keys[1]).name}.wav":
            raise OSError(28, "No space left on device")
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", full)
    result = runs.call(capsys, "decode", store, "--all", "-o", tmp_path / "audio")
    assert (result.code, result.out) == (6, "")
    assert result.err == (
        f"latentmill: Cannot write {tmp_path}/audio/{keys[1]}.wav: No space left on device.\n"
    )
    assert list(audio_in(tmp_path / "audio")) == [keys[0]]


def test_it_stops_if_nothing_can_be_decoded(
    copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    """Not after days at the last of a million records."""
    tried = []

    def fail(*given: object) -> str:
        tried.append(given)
        raise ConfigError("Model mdct: 10.0 s of audio at once do not fit: use --device cpu.")

    monkeypatch.setattr(cli_decode, "write_decoded", fail)
    monkeypatch.setattr(cli_decode, "MOST_IN_A_ROW", 3)
    result = runs.call(capsys, "decode", copy, "--all", "-o", tmp_path / "out")
    assert (result.code, len(tried)) == (7, 3)
    assert "3 records in a row cannot be decoded" in result.err
    assert "use --device cpu" in result.err


def test_a_store_that_is_gone_ends_it(
    copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    """As after an unmount: it is not one damaged shard after the other."""
    real, out = cli_decode.write_decoded, tmp_path / "out"

    def then_moved(path: Path, *given: Any) -> str:
        written = real(path, *given)
        copy.rename(tmp_path / "elsewhere")
        return written

    monkeypatch.setattr(cli_decode, "write_decoded", then_moved)
    result = runs.call(capsys, "decode", copy, "--all", "-o", out)
    assert (result.code, len(audio_in(out))) == (6, 1)
    assert "No such file" in result.err
