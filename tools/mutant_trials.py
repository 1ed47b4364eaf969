"""Tries mutants with the tests that execute their lines, in forks of one process."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import math
import os
import resource
import signal
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any

import duckdb  # noqa: F401  the forks have these already
import numpy as np  # noqa: F401
import pyarrow.parquet  # noqa: F401
import pytest
import ray  # noqa: F401
import torch  # noqa: F401
from _pytest.main import pytest_runtestloop
from hypothesis import HealthCheck, Phase, settings
from mutation import LIBRARY, ROOT, Mutant

# As in `make test`, but the same examples for every mutant. That a test fails is enough, so no
# shrinking.
settings.register_profile(
    "mutants",
    deadline=None,
    max_examples=30,
    derandomize=True,
    database=None,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)

MEMORY = 6 << 30  # bytes; a mutant may allocate without end


class Lines:
    """Which lines of a module each test executes, and how long the test takes.

    A pytest plugin records it. What is executed for a fixture of several tests counts for all
    tests. Each line goes to a file at once, because tests may fork; other processes of tests are
    not recorded.
    """

    def __init__(self, module: str) -> None:
        self._module = str(LIBRARY / module)
        self._file = tempfile.TemporaryFile("a+")  # noqa: SIM115
        self._test = ""  # the running test; empty: all
        self._seen: set[int] = set()
        self._tests: dict[int, set[str]] = defaultdict(set)
        self.seconds: dict[str, float] = {}

    def trace(self, frame: Any, _event: str, _: Any) -> Any:
        """What `sys.settrace` calls."""
        if frame.f_code.co_filename != self._module:
            return None
        if frame.f_lineno not in self._seen:
            self._seen.add(frame.f_lineno)
            self._write("line", frame.f_lineno)
        return self.trace

    def load(self) -> None:
        """Read what a fork has recorded."""
        self._file.seek(0)
        for test, what, value in map(json.loads, self._file):
            if what == "line":
                self._tests[value].add(test)
            else:
                self.seconds[test] = value

    def tests_of(self, mutant: Mutant) -> list[str]:
        """The tests that execute a mutant's lines, the fastest first."""
        found = set().union(*(self._tests[line] for line in mutant.lines))
        every = "" in found or not mutant.in_function
        return sorted(self.seconds if every else found, key=self.seconds.__getitem__)

    def _write(self, what: str, value: float) -> None:
        os.write(self._file.fileno(), (json.dumps([self._test, what, value]) + "\n").encode())

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        self._test, self._seen, start = item.nodeid, set(), time.monotonic()
        result = yield
        self._write("seconds", time.monotonic() - start)
        return result

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef: Any) -> Iterator[None]:
        before = self._test, self._seen
        if fixturedef.scope != "function":
            self._test, self._seen = "", set()
        result = yield
        self._test, self._seen = before
        return result


class Trials:
    """A pytest plugin that tries mutants in functions, when everything is imported and collected.

    A fork tries one: it puts the changed code into the functions of the module.
    """

    def __init__(self, mutants: list[Mutant], lines: Lines, results: int) -> None:
        """`results` is the descriptor of a file, to which 1 or 0 is written for each mutant."""
        self.mutants, self.lines, self.results = mutants, lines, results

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        if _failed(lambda _: self._record(session), math.inf):
            raise pytest.UsageError("the tests fail without a change")
        self.lines.load()
        for mutant in self.mutants:
            tests = self.lines.tests_of(mutant)
            noticed = _noticed(mutant, self.lines, partial(_changed_run, session, mutant, tests))
            os.write(self.results, b"%d" % noticed)
        return True

    def _record(self, session: pytest.Session) -> bool:
        session.config.pluginmanager.register(self.lines)
        sys.settrace(self.lines.trace)
        threading.settrace(self.lines.trace)
        return _run_items(session)


def _run_items(session: pytest.Session) -> bool:
    """Run the collected tests; whether one failed."""
    with contextlib.suppress(session.Failed):
        pytest_runtestloop(session)
    return session.testsfailed > 0


def _changed_run(session: pytest.Session, mutant: Mutant, tests: list[str], _: Path) -> bool:
    Selection(tests).pytest_collection_modifyitems(session.items)
    path = str(LIBRARY / mutant.module)
    codes, new = [compile(mutant.text(), path, "exec")], {}
    while codes:
        code = codes.pop()
        new[code.co_qualname, code.co_firstlineno] = code
        codes += [one for one in code.co_consts if isinstance(one, CodeType)]
    gc.unfreeze()  # objects that are frozen are not listed
    for function in gc.get_objects():
        if isinstance(function, FunctionType) and function.__code__.co_filename == path:
            code = function.__code__
            function.__code__ = new[code.co_qualname, code.co_firstlineno]
    return _run_items(session)


@dataclass(eq=False)  # pytest hashes it
class Selection:
    """A pytest plugin: runs only some tests, in the given order."""

    tests: list[str]

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        order = {test: number for number, test in enumerate(self.tests)}
        items[:] = sorted((i for i in items if i.nodeid in order), key=lambda i: order[i.nodeid])


def tried(module: str, files: list[str], mutants: list[Mutant]) -> Iterator[tuple[Mutant, bool]]:
    """Try mutants of one module with the tests in `files`.

    Yields each of them and whether it was noticed.
    """
    inside = [mutant for mutant in mutants if mutant.in_function]
    lines = Lines(module)
    with tempfile.TemporaryFile() as results:
        trials = Trials(inside, lines, results.fileno())
        if _failed(lambda _: _pytest(LIBRARY.parent, files, trials), math.inf):
            raise SystemExit(f"the tests of {module} fail without a change")
        results.seek(0)
        yield from zip(inside, map(bool, map(int, results.read().decode())), strict=True)
    lines.load()
    print(f"{module}: {len(lines.seconds)} tests, {sum(lines.seconds.values()):.0f} s", flush=True)
    for mutant in mutants:
        if mutant not in inside:
            yield mutant, _noticed(mutant, lines, partial(_imported_run, mutant, lines))


def _imported_run(mutant: Mutant, lines: Lines, folder: Path) -> bool:
    """Run the tests with a changed module, which other modules have not imported yet."""
    tests = lines.tests_of(mutant)
    files = dict.fromkeys(test.partition("::")[0] for test in tests)
    return _pytest(folder, [*files], Selection(tests)) != 0


def _pytest(pipeline: Path, files: list[str], plugin: object) -> int:
    sys.path.insert(0, str(pipeline))
    options = ["-x", "-q", "-p", "no:cacheprovider", "--hypothesis-profile=mutants"]
    options += ["-k", "not s3"]  # slow with a tracer, and the same as on other storage
    return pytest.main([*options, *files], plugins=[plugin])


def _noticed(mutant: Mutant, lines: Lines, run: Callable[[Path], bool]) -> bool:
    """Whether a test fails with the change, or they do not end in time."""
    tests = lines.tests_of(mutant)
    if not tests:
        return False

    def changed(folder: Path) -> bool:
        _link(LIBRARY.parent, folder, Path("latentmill") / mutant.module)
        (folder / "latentmill" / mutant.module).write_text(mutant.text(), "utf-8")
        os.environ["PYTHONPATH"] = str(folder)  # for processes that the tests start
        return run(folder)

    return _failed(changed, 20 + 4 * sum(lines.seconds[test] for test in tests))


def _link(source: Path, folder: Path, missing: Path) -> None:
    """Fill a folder with links to what is in another one, without one file."""
    first, *rest = missing.parts
    for path in source.iterdir():
        if path.name != first:
            (folder / path.name).symlink_to(path)
    if rest:
        (folder / first).mkdir()
        _link(source / first, folder / first, Path(*rest))


def _failed(run: Callable[[Path], bool | int], timeout: float) -> bool:
    """Whether a function returns true or an exit status in a fork, or does not end in time.

    It gets a temporary folder, in which all temporary files are.
    """
    with tempfile.TemporaryDirectory() as folder:
        child = os.fork()
        if child == 0:
            _prepare(folder)
            status = 1
            try:
                (Path(folder) / "pipeline").mkdir()
                status = int(run(Path(folder) / "pipeline"))
            finally:
                os._exit(status)
        end, ended, status = time.monotonic() + timeout, 0, 1
        while not ended and time.monotonic() < end:
            time.sleep(0.02)
            ended, status = os.waitpid(child, os.WNOHANG)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child, signal.SIGKILL)  # also what the tests have left running
        if not ended:
            os.waitpid(child, 0)
        return not ended or status != 0


def _prepare(folder: str) -> None:
    """Make this process independent, bounded and quiet."""
    os.setsid()
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: end with the parent
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
    os.environ |= {"TMPDIR": folder, "PYTEST_DEBUG_TEMPROOT": folder}
    tempfile.tempdir = None
    sys.dont_write_bytecode = True
    os.chdir(ROOT)
    nowhere = os.open(os.devnull, os.O_RDWR)
    for descriptor in range(3):
        os.dup2(nowhere, descriptor)
