"""Log messages: what -v and -q print, and what a program that calls the library gets."""

from __future__ import annotations

import json
import logging
import re
import subprocess
import sys
from pathlib import Path

import pytest

from latentmill.cli.entry import _interruption
from latentmill.cli.log import messages_on_stderr, set_format
from latentmill.run.run import encode
from latentmill.text.log import get_logger
from support import runs
from support.faulty_s3 import Faults
from support.storage_faults import faulty_s3

Capture = pytest.CaptureFixture[str]
ENCODE = ("--device", "cpu", "--workers", 1, "--threads", 1)


@pytest.fixture(scope="module")
def songs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.write_songs(tmp_path_factory.mktemp("songs"), 2)


def test_quiet_leaves_results_and_errors(
    songs: Path, tmp_path: Path, capsys: Capture, inline: None
) -> None:
    result = runs.call(capsys, "--quiet", "encode", songs, tmp_path / "lat", *ENCODE)
    assert (result.code, result.err) == (0, "")
    assert result.out.startswith(f"{tmp_path}/lat: 2 encoded")
    refused = runs.call(capsys, "encode", songs / "nowhere", tmp_path / "lat2", "-q")
    assert refused.code == 4
    assert refused.err.startswith("latentmill: ")


def test_verbose_adds_what_the_workers_do(
    songs: Path, tmp_path: Path, capsys: Capture, ray_session: Path
) -> None:
    result = runs.call(capsys, "encode", songs, tmp_path / "lat", *ENCODE, "--verbose")
    assert result.code == 0
    lines = result.err.splitlines()
    assert all(re.match(r"\d\d:\d\d:\d\d\.\d{3} \S", line) for line in lines)
    wanted = (
        "starting a worker with 1 CPU cores",
        r"process \d+ on \S+: loaded the model mdct on cpu in [\d.]+ s",
        r"unit 000000 given to process \d+ on \S+: 2 items, 2 s of audio",
        r"unit 000000 committed by process \d+ on \S+ in [\d.]+ s: 2 encoded, 0 skipped, 0 failed",
    )
    found = [next(n for n, line in enumerate(lines) if re.search(one, line)) for one in wanted]
    assert found == sorted(found)


def test_verbose_tells_of_requests_that_are_retried(
    songs: Path, s3_bucket: str, capsys: Capture, inline: None
) -> None:
    retry = re.compile(r"attempt 1 failed \(\S.*\): retrying in \d\.\d s$", re.MULTILINE)
    store = f"{s3_bucket}/lat"
    with faulty_s3(Faults(errors=0.3, seed=1)) as faults:
        verbose = runs.call(capsys, "-v", "encode", songs, store, *ENCODE)
        assert (verbose.code, bool(faults.seen["error"])) == (0, True)
        assert retry.search(verbose.err)
        faults.seen.clear()
        plain = runs.call(capsys, "status", store)
        assert (plain.code, bool(faults.seen["error"])) == (0, True)
        assert "retrying" not in plain.err


def test_json_events_and_messages_are_one_object_per_line(
    songs: Path, tmp_path: Path, capsys: Capture, inline: None
) -> None:
    config = tmp_path / "run.yaml"
    config.write_text("log_format: json\n")
    result = runs.call(capsys, "-v", "encode", songs, tmp_path / "lat", "--config", config, *ENCODE)
    events = [json.loads(line) for line in result.err.splitlines()]
    assert {event["event"] for event in events} >= {"begin", "note", "unit_done", "end"}
    loaded = next(e for e in events if "loaded the model" in e.get("text", ""))
    assert (loaded["level"], loaded["logger"]) == ("debug", "latentmill.models")


def test_a_program_gets_messages_as_it_sets_its_loggers(
    songs: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, inline: None
) -> None:
    options = {"device": "cpu", "workers": 1, "threads": 1}
    encode(songs, tmp_path / "quiet", **options)  # type: ignore[arg-type]
    assert not [one for one in caplog.records if one.name.startswith("latentmill")]
    with caplog.at_level(logging.DEBUG, "latentmill"):
        encode(songs, tmp_path / "all", **options)  # type: ignore[arg-type]
    by_level: dict[str, str] = {}
    for record in caplog.records:
        text = record.getMessage()
        by_level[record.levelname] = by_level.get(record.levelname, "") + text + "\n"
    assert "2 items; starting the workers" in by_level["INFO"]
    assert "2/2 items" in by_level["INFO"]
    assert "loaded the model mdct on cpu" in by_level["DEBUG"]


WARNS = """
import logging, latentmill, latentmill.run.run
from latentmill.text.log import get_logger
assert not logging.getLogger("latentmill").handlers
assert logging.getLogger("latentmill").level == logging.NOTSET
get_logger("engine").info("unseen")
get_logger("engine").warning("seen")
"""


def test_without_any_settings_only_warnings_are_printed() -> None:
    ended = subprocess.run(
        [sys.executable, "-c", WARNS], capture_output=True, text=True, check=True
    )
    assert (ended.stdout, ended.stderr) == ("", "seen\n")


@pytest.mark.parametrize("as_json", [True, False])
def test_messages_have_no_secrets_and_stay_on_one_line(
    as_json: bool, capsys: Capture, caplog: pytest.LogCaptureFixture
) -> None:
    log = get_logger("storage")
    log.warning("cannot read %s", "https://user:hunter2@host/a\x1b[31m\nb?token=0123456789abcdef")
    assert "hunter2" not in caplog.text
    with messages_on_stderr(logging.INFO):
        set_format("json" if as_json else "text")
        log.warning("cannot read %s", "https://user:hunter2@host/a\x1b[31m\nb")
        log.debug("unseen")
    printed = capsys.readouterr().err
    assert "hunter2" not in printed
    assert "\x1b" not in printed
    assert printed.count("\n") == 1
    assert as_json or printed.startswith("latentmill: warning: cannot read https://***@host/a\\x1b")
    log.warning("after the command")
    assert capsys.readouterr().err == ""  # the handler is removed; pytest's own takes it


def test_tracebacks_of_gcsfs_are_not_printed() -> None:
    """Python prints warnings of loggers without a handler."""
    script = (
        "import logging\n"
        "from latentmill.cli.log import messages_on_stderr\n"
        "with messages_on_stderr(logging.INFO):\n"
        "    logging.getLogger('gcsfs.retry').error('_request out of retries')\n"
        "    logging.getLogger('another').error('a line')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "a line\n")


def test_only_commands_that_resume_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    resumed = "; run the same command again to resume"
    for words, hint in {
        "-v encode songs store": resumed,
        "status store": "",
        "status encode": "",
        "decode store --all -o audio --skip-existing": resumed,
        "decode store --all -o audio": "; add --skip-existing to decode only the rest",
        "decode store --all -o audio --overwrite": "",
        "select store dest --copy": resumed,
        "select store dest": "",
    }.items():
        monkeypatch.setattr(sys, "argv", ["latentmill", *words.split()])
        assert _interruption() == f"latentmill: interrupted{hint}"
