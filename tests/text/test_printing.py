"""Names from outside cannot steer the terminal or forge lines of output."""

from __future__ import annotations

import json
import logging
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import soundfile

from latentmill.cli.log import messages_on_stderr, set_format
from latentmill.engine.progress import for_stream
from latentmill.plan import Unit
from latentmill.run.run import encode
from latentmill.store.schema import DATASET_PATH
from latentmill.text.log import get_logger
from latentmill.text.printing import number_text, printable, printable_json, printable_value
from support import runs
from support.in_process import in_process

Capture = pytest.CaptureFixture[str]

# Colours, a window title, a link, a forged line, a carriage return, bidi overrides, C1, NUL-like.
EVIL = (
    "a\x1b[31mred\x1b]0;title\x07\x1b]8;;http://evil\x1b\\b\n  failed: forged: reason\rover"
    "\u202egpj.\u2066x\u200e\x9b31m\x7f\u2028\ufeffend"
)
UNSAFE = re.compile(
    "[\x00-\x09\x0b-\x1f\x7f-\x9f\u200e\u202a-\u202e\u2028\u2029\u2066-\u2069\ufeff]"
)


def assert_harmless(text: str) -> None:
    assert not UNSAFE.search(text), ascii(text)
    assert not re.search(r"^\s*failed: forged", text, re.MULTILINE), text


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b[31m", r"\x1b[31m"),
        ("a\nb\r\t", r"a\nb\r\t"),
        ("\x9b\x7f\x00", r"\x9b\x7f\x00"),
        ("\u202e\u2066\u2028", r"\u202e\u2066\u2028"),
        ("x\udce9", r"x\udce9"),
        ("\U000e0041", r"\U000e0041"),
        ("été 東京 🎵 نامه‌ای \\", "été 東京 🎵 نامه‌ای \\"),
    ],
)
def test_printable(text: str, shown: str) -> None:
    assert printable(text) == shown
    assert json.loads(printable_json({text: [text]})) == {text: [text]}
    assert_harmless(printable_json({text: [text]}))


def test_every_text_of_a_value_is_made_printable() -> None:
    @dataclass(frozen=True)
    class Value:
        name: str
        pairs: tuple[tuple[str, str], ...]
        counts: dict[str, int]

    value = printable_value(Value("\x1b", (("\n", "ok"),), {"\x07": 1}))
    assert value == Value(r"\x1b", ((r"\n", "ok"),), {r"\x07": 1})


@pytest.fixture(scope="module")
def evil_store(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A corpus whose names are evil, one file of it broken, and its store."""
    folder = tmp_path_factory.mktemp("evil")
    source = folder / f"so\x1b[31murce\n{'x'}"
    source.mkdir()
    for number in range(3):
        noise = np.random.default_rng(number).uniform(-0.3, 0.3, 9 * 44100)
        soundfile.write(source / f"{number} {EVIL.replace('/', '-')}.wav", noise, 44100)
    (source / f"broken {EVIL.replace('/', '-')}.wav").write_bytes(b"RIFF")
    (source / "cover.\x1b[31mjpg").write_bytes(b"")
    store = folder / "store"
    options = {"chunk_seconds": 2.0, "unit_seconds": 5.0}
    with in_process():
        encode(str(source), str(store), device="cpu", threads=1, **options)
    return source, store


def damaged(store: Path, folder: Path) -> Path:
    copy = Path(shutil.copytree(store, folder / "damaged"))
    for commit in (copy / "commits").iterdir():
        document = json.loads(commit.read_text())
        document["items"][0]["hash"] = "0" * 16
        commit.write_text(json.dumps(document))
    (copy / DATASET_PATH).unlink()
    return copy


@pytest.mark.parametrize("as_json", [False, True], ids=["text", "json"])
@pytest.mark.parametrize(
    "command",
    [
        "encode SOURCE STORE --chunk-seconds 2 --unit-seconds 5",
        "plan SOURCE NEW --no-calibrate",
        "status STORE",
        "info STORE",
        "verify STORE --decode 1",
        "verify DAMAGED",
        "decode STORE KEY -o NEW",
        "decode STORE NEAR -o NEW",
        "mix STORE KEY -o NEW/mix.wav",
        "mix STORE KEY:x -o NEW/mix.wav",
        "mix STORE NEAR -o NEW/mix.wav",
        "export STORE NEW --to stable-audio-tools",
        "export DAMAGED NEW --to webdataset",
        "evaluate STORE --items 1 --max-seconds 2",
        "models \x1b[31m",
        "status \x1b[31m",
        "\x1b[31m",
    ],
)
def test_no_command_prints_control_characters(
    command: str, as_json: bool, evil_store: tuple[Path, Path], tmp_path: Path, capsys: Capture
) -> None:
    source, store = evil_store
    key = f"0 {EVIL.replace('/', '-')}"
    places = {"SOURCE": str(source), "STORE": str(store), "KEY": key, "NEAR": key[:-1]}
    places |= {"NEW": str(tmp_path / f"new\x1b[31m\n{'y'}")}
    if "DAMAGED" in command:
        places["DAMAGED"] = str(damaged(store, tmp_path))
    args = command.split(" ")
    for name, value in places.items():
        args = [arg.replace(name, value, 1) if arg.startswith(name) else arg for arg in args]
    result = runs.call(capsys, *args, *(["--json"] if as_json else []))
    assert_harmless(result.out)
    assert_harmless(result.err)
    assert result.out or result.err
    if as_json and result.out:
        json.loads(result.out)


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_progress_and_messages_have_no_control_characters(log_format: str, capsys: Capture) -> None:
    with messages_on_stderr(logging.INFO):
        set_format(log_format)
        get_logger("engine").warning("a worker was lost: %s", EVIL)
        for_stream(log_format).unit_lost(Unit(0, 1, 1.0), 1, EVIL)  # type: ignore[arg-type]
    printed = capsys.readouterr().err
    assert len(printed.splitlines()) == 2
    assert_harmless(printed)


@pytest.mark.parametrize(
    ("value", "digits", "text"),
    [
        (7265.3, 3, "7265"),
        (999.7, 3, "1000"),
        (-999.7, 3, "-1000"),
        (99.7, 2, "100"),
        (250, 2, "250"),
        (65504.0, 3, "65504"),
        (12345.6, 4, "12346"),
        (214.96, 3, "215"),
        (0.04757, 3, "0.0476"),
        (-1.95e-06, 3, "-1.95e-06"),
        (0.0, 3, "0"),
        (1.5e300, 3, "1.5e+300"),
        (float("inf"), 3, "inf"),
        (float("nan"), 3, "nan"),
    ],
)
def test_a_large_number_has_no_exponent(value: float, digits: int, text: str) -> None:
    assert number_text(value, digits) == text
