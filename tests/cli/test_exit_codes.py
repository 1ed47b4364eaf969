"""Every exit code of docs/running.md, each provoked; 9 by a head that is gone in test_nodes.py."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from latentmill.cli import entry
from latentmill.cli.entry import INTERRUPTED_EXIT_CODE
from latentmill.errors import LatentmillError
from support import runs

RUNNING = Path(__file__).parents[2] / "docs/running.md"
HERE = {  # by code, a test that provokes it where it cannot be done quickly here
    0: "cli/test_cli.py",
    3: "cli/test_cli.py",
    6: "run/test_run_faults.py",
    8: "cli/test_cli.py",
    9: "run/test_run.py",
    10: "jobs/test_training_job.py",
    130: "run/test_kill.py",
}


def test_wrong_usage_wrong_source_wrong_model_wrong_store(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    songs = runs.write_songs(tmp_path / "songs", 1)
    store, empty = tmp_path / "store", tmp_path / "empty"
    empty.mkdir()
    assert runs.call(capsys, "encode", songs, store, "--device", "abacus").code == 2
    assert runs.call(capsys, "encode", songs, store, "--no-such-option").code == 2
    assert runs.call(capsys, "encode", tmp_path / "nowhere", store).code == 4
    assert runs.call(capsys, "encode", empty, store).code == 4
    assert runs.call(capsys, "encode", songs, store, "--model", "nonesuch").code == 7
    (store / "shards").mkdir(parents=True)
    (store / "shards" / "000000.parquet").write_text("precious")
    assert runs.call(capsys, "encode", songs, store).code == 5


def test_a_bug_is_a_traceback_and_code_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def bug(settings: object, progress: object) -> None:
        raise ZeroDivisionError("token=0123456789abcdef a bug")

    monkeypatch.setattr("latentmill.run.run.run", bug)
    monkeypatch.setattr(sys, "argv", ["latentmill", "encode", "a", "b"])
    with pytest.raises(SystemExit) as ended:
        entry.main()
    assert ended.value.code == 1
    printed = capsys.readouterr().err
    assert printed.startswith("Traceback")
    assert printed.endswith("ZeroDivisionError: token=*** a bug\n")


def test_the_table_has_every_code_and_no_other() -> None:
    table = re.findall(r"^\| (\d+) \|", RUNNING.read_text(encoding="utf-8"), re.MULTILINE)

    def codes(kind: type[LatentmillError]) -> set[int]:
        return {kind.exit_code}.union(*(codes(sub) for sub in kind.__subclasses__()))

    documented = {int(code) for code in table}
    assert documented == codes(LatentmillError) | {0, INTERRUPTED_EXIT_CODE}
    assert set(HERE) | {1, 2, 4, 5, 7} == documented
    tests = Path(__file__).parents[1]
    for code, name in HERE.items():
        text = (tests / name).read_text()
        assert re.search(rf"(code|returncode) == {code}\b|\(code, .*== \({code},", text), name
