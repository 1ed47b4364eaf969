"""The command as a process of its own: how it starts, is interrupted and ends."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from latentmill.cli.entry import INTERRUPTED_EXIT_CODE
from latentmill.run.run import encode
from support import runs
from support.in_process import in_process

EVERY_COMMAND = (
    ("status", "STORE"),
    ("status", "STORE", "--json"),
    ("info", "STORE"),
    ("verify", "STORE", "--decode", "1"),
    ("decode", "STORE", "--all", "-o", "FOLDER", "--overwrite"),
    ("mix", "STORE", "album 0/song 00", "-o", "FOLDER/mix.wav", "--overwrite"),
    ("export", "STORE", "FOLDER/export", "--to", "webdataset"),
    ("evaluate", "STORE", "--items", "2"),
    ("plan", "SONGS", "STORE", "--no-calibrate", "--unit-seconds", "1"),
    ("encode", "SONGS", "STORE", "--unit-seconds", "1"),
    ("models",),
    ("models", "mdct"),
    ("version",),
    ("--version",),
    ("--help",),
)
SCRIPT = "import sys, latentmill as lm; lm.open(sys.argv[1])"


@pytest.fixture(scope="module")
def songs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.write_songs(tmp_path_factory.mktemp("songs"), 3)


@pytest.fixture(scope="module")
def store(songs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("store") / "latents"
    with in_process():
        encode(str(songs), str(out), threads=1, unit_seconds=1)
    return out


def command(words: Sequence[str], songs: Path, store: Path, folder: Path) -> list[str]:
    places = {"STORE": store, "SONGS": songs, "FOLDER": folder}
    filled = list(words)
    for name, path in places.items():
        filled = [word.replace(name, str(path)) for word in filled]
    return filled


def python(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *map(str, arguments)], capture_output=True, text=True, check=False
    )


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("words", EVERY_COMMAND, ids=" ".join)
def test_no_command_aborts_at_its_end(
    words: Sequence[str], songs: Path, store: Path, tmp_path: Path
) -> None:
    """Fifty times, three processes for each core, so that threads are interrupted anywhere."""

    def run(number: int) -> list[tuple[int, str]]:
        folder = tmp_path / str(number)
        copy = Path(shutil.copytree(store, folder / "store"))
        arguments = command(words, songs, copy, folder)
        ends = [python("-m", "latentmill", *arguments) for _ in range(10)]
        return [(end.returncode, end.stderr if end.returncode else "") for end in ends]

    with ThreadPoolExecutor(3 * (os.cpu_count() or 1)) as pool:
        ends = Counter(end for part in pool.map(run, range(5)) for end in part)
    print(*words, dict(ends))
    assert ends == {(0, ""): 50}


@pytest.mark.parametrize(
    "words", [("-m", "latentmill", "status", "STORE"), ("-c", SCRIPT, "STORE")]
)
def test_reading_a_store_ends_well(
    words: Sequence[str], songs: Path, store: Path, tmp_path: Path
) -> None:
    """Three times: an abort at the end is not one every time."""
    ends = [python(*command(words, songs, store, tmp_path)) for _ in range(3)]
    assert [(end.returncode, end.stderr) for end in ends] == [(0, "")] * 3


THREADS = """
import os, sys
import pyarrow.parquet
from latentmill.plan import load
from latentmill.storage.storage import Storage
threads = lambda: set(os.listdir("/proc/self/task"))
before = threads()
assert load(Storage(sys.argv[1])).units
print(len(threads() - before))
"""


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs Linux's /proc")
def test_reading_a_plan_starts_no_thread(store: Path) -> None:
    """Such a thread may hold Python's bytes at the end, which can abort the process."""
    end = python("-c", THREADS, store)
    assert (end.stdout, end.stderr) == ("0\n", "")


IMPORTED = """
import sys
from latentmill.cli.entry import main
slow = sys.argv.pop(1).split()
try:
    main()
finally:
    print(*sorted(set(slow) & set(sys.modules)), file=sys.stderr)
"""
NEVER = "torch ray latentmill.config pyarrow.compute"


@pytest.mark.parametrize(
    ("words", "slow"),
    [
        (("-h",), f"{NEVER} numpy pyarrow pydantic fsspec"),
        (("--version",), f"{NEVER} numpy pyarrow pydantic fsspec rich"),
        (("status", "STORE"), NEVER),
        (("info", "STORE"), NEVER),
    ],
)
def test_quick_commands_import_nothing_slow(
    words: Sequence[str], slow: str, songs: Path, store: Path, tmp_path: Path
) -> None:
    end = python("-c", IMPORTED, slow, *command(words, songs, store, tmp_path))
    assert (end.returncode, end.stderr) == (0, "\n")
    assert end.stdout


# Sends the signal when a module is about to be imported: no clock decides when.
INTERRUPTED = """
import os, signal, sys

_, module, number, *arguments = sys.argv
sys.argv = ["latentmill", *arguments]

class Interrupt:
    def find_spec(self, name, path=None, target=None):
        if name == module:
            sys.meta_path.remove(self)
            os.kill(os.getpid(), int(number))

from latentmill.cli.entry import main
sys.meta_path.insert(0, Interrupt())
main()
"""
MOMENTS = ("typer", "ray._raylet")
MORE_MOMENTS = (
    "latentmill.cli.app",
    "pydantic",
    "numpy",
    "torch",
    "latentmill.run.run",
    "torch.nn",
    "latentmill.engine.launch",
    "latentmill.engine.scheduler",
)


@pytest.mark.parametrize(
    ("number", "module"),
    [
        *((signal.SIGINT, one) for one in MOMENTS),
        *(pytest.param(signal.SIGINT, one, marks=pytest.mark.slow) for one in MORE_MOMENTS),
        (signal.SIGTERM, "torch"),
    ],
)
def test_an_interrupt_at_any_moment_of_the_start_is_one_line(
    module: str, number: signal.Signals, songs: Path, tmp_path: Path
) -> None:
    end = python("-c", INTERRUPTED, module, number.value, "encode", songs, tmp_path / "store")
    assert end.returncode == INTERRUPTED_EXIT_CODE
    assert (
        end.stderr.splitlines()[-1]
        == "latentmill: interrupted; run the same command again to resume"
    )
    assert "Traceback" not in end.stderr
    assert "ignored" not in end.stderr
