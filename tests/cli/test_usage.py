"""A wrong command line is one sentence that names the option and says what to do."""

from __future__ import annotations

import re

import pytest

from support import runs

WRONG = {
    "encode a b --workers x": "invalid --workers 'x': expected a whole number.",
    "encode a b --workers 1.5": "invalid --workers 1.5: expected a whole number.",
    "encode a b --workers 0": "invalid --workers 0: it must be greater than or equal to 1.",
    "encode a b --overlap x": "invalid --overlap 'x': expected a number.",
    "encode a b --load-timeout inf": "invalid --load-timeout inf: it must be a finite number.",
    "encode a b --workers": "--workers needs a value: write --workers VALUE.",
    "encode a b --extend=x": "--extend takes no value: write only --extend.",
    "encode a b c": "unexpected argument c: `latentmill encode --help` shows the arguments.",
    "encode a b --where x=": "invalid --where condition 'x=' (invalid syntax): write it like "
    "genre == 'rock' and bpm > 100.",
    "encode a b --worker 1": "unknown option --worker: did you mean --workers?",
    "evaluate a --items 0": "invalid --items 0: it must be greater than or equal to 1.",
    "evaluate a --max-seconds 0": "invalid --max-seconds 0: it must be greater than or equal to "
    "0.1.",
    "verify a --decode=-1": "invalid --decode -1: it must be greater than or equal to 0.",
    "mix a b --seed x -o c.wav": "invalid --seed 'x': expected a whole number.",
    "decode a b": "--output is missing: `latentmill decode --help` shows how to use it.",
    "mix -o c.wav": "STORE is missing: `latentmill mix --help` shows how to use it.",
    "status a --zzz": "unknown option --zzz: `latentmill status --help` lists the options.",
    "statu a": "unknown command statu: did you mean status?",
    "zzz": "unknown command zzz: `latentmill --help` lists them.",
    "decode a\x1b[31m b -o c --format mp3": "invalid --format 'mp3': use wav or flac.",
    "status --a\x1b": "unknown option --a\\x1b: `latentmill status --help` lists the options.",
}


@pytest.mark.parametrize("words", WRONG)
def test_a_wrong_command_line_is_one_sentence(
    words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    result = runs.call(capsys, *words.split(" "))
    assert (result.code, result.out, result.err) == (2, "", f"latentmill: {WRONG[words]}\n")


@pytest.mark.parametrize("command", ["select", "push", "annotate"])
def test_paragraphs_of_the_help_fill_the_lines(
    capsys: pytest.CaptureFixture[str], command: str
) -> None:
    text = runs.call(capsys, command, "--help").out.partition("╭")[0]
    for paragraph in re.split(r"\n\s*\n", text.strip()):
        *lines, _ = paragraph.splitlines()
        assert all(len(line.rstrip()) > 60 for line in lines), paragraph
