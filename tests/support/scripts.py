"""Scripts of the repository, run in this process: importing torch and Ray anew takes seconds."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest

from support.runs import Result


def run_here(capsys: pytest.CaptureFixture[str], script: Path, *arguments: object) -> Result:
    """Run a script as `python SCRIPT ARGUMENTS` does."""
    code: object = 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [str(script), *map(str, arguments)])
        patch.setattr(sys, "path", [str(script.parent), *sys.path])
        try:
            runpy.run_path(str(script), run_name="__main__")
        except SystemExit as end:
            code = end.code or 0
    printed = capsys.readouterr()
    assert isinstance(code, int), code
    return Result(code, printed.out, printed.err)
