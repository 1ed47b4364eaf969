"""How many random changes to core modules do the modules' own tests notice?

    python tools/mutants.py --count 300 --seed 1 --results tools/results/mutants.json
    python tools/mutants.py --unnoticed --results tools/results/mutants.json   # after new tests

Each mutant is one changed operator, comparison or constant. It counts as noticed if the tests of
its module fail or do not end in time. First the tests of each module run unchanged, and it is
recorded which lines of the module each of them executes. A mutant is then tried with the tests that
execute its line, the fastest first, until one fails; one on a line that no test executes is
unnoticed. Mutants that change no result (the size of a buffer, a redundant condition) count as
unnoticed, too. Write the reason into the results as `no_effect`: the score is printed with and
without them. Takes about 10 s for each mutant; run by hand.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import copy
import ctypes
import gc
import itertools
import json
import math
import os
import random
import resource
import signal
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
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

ROOT = Path(__file__).parents[1]
LIBRARY = ROOT / "pipeline" / "latentmill"
MEMORY = 6 << 30  # bytes; a mutant may allocate without end
# Each module, and the tests that are about it.
MODULES = {
    "encoding/chunks.py": ["tests/encoding/test_chunks.py", "tests/encoding/test_stitch.py"],
    "encoding/lanes.py": ["tests/encoding/test_lanes.py"],
    "plan/drafting.py": ["tests/plan"],
    "plan/compare.py": ["tests/run/test_extend.py"],
    "plan/sort.py": ["tests/plan"],
    "store/commit.py": ["tests/store/test_commit.py", "tests/store/test_writers.py"],
    "store/index.py": [
        "tests/store/test_index.py",
        "tests/store/test_index_damage.py",
        "tests/store/test_schemas.py",
    ],
    "store/seal.py": ["tests/store/test_seal.py", "tests/store/test_revisions.py"],
    "store/statistics.py": ["tests/store/test_statistics.py"],
    "ops/arithmetic.py": ["tests/ops"],
    "ops/origin.py": ["tests/ops"],
    "ops/time.py": ["tests/ops"],
    "reader/order.py": ["tests/reader/test_order.py"],
    "reader/crops.py": ["tests/reader/test_crops.py", "tests/reader/test_dataset.py"],
    "reader/sharding.py": ["tests/reader/test_ranks.py", "tests/reader/test_stream.py"],
    "reader/batches.py": ["tests/reader/test_batches.py"],
    "reader/column_conditions.py": ["tests/reader/test_column_conditions.py"],
    "decoding/decoder.py": ["tests/decoding/test_decoder.py"],
    "sources/manifest.py": ["tests/sources/test_source_manifest.py"],
    "audio/headers.py": [
        "tests/audio/test_audio_truncation.py",
        "tests/audio/test_audio_decode.py",
    ],
    "engine/dispatch.py": ["tests/engine/test_dispatch.py"],
    "engine/lease.py": ["tests/engine/test_lease.py"],
}
_COMPARE = {
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
}
_ARITHMETIC = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Add,
    ast.FloorDiv: ast.Mult,
    ast.Div: ast.Mult,
    ast.Mod: ast.Mult,
}


@dataclass(frozen=True)
class Mutant:
    """A changed place of a module."""

    module: str
    line: int
    column: int  # in bytes of UTF-8, as `ast` counts
    was: str
    now: str
    no_effect: str = ""  # why no test can notice it; written by hand

    @property
    def lines(self) -> range:
        return range(self.line, self.line + self.was.count("\n") + 1)

    @property
    def in_function(self) -> bool:
        """Whether it is in a function's body: what importing the module does is as before."""
        place = self.line, self.column
        for node in ast.walk(ast.parse((LIBRARY / self.module).read_text("utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.Lambda):
                body = node.body if isinstance(node.body, list) else [node.body]
                start = body[0].lineno, body[0].col_offset
                if start <= place < (body[-1].end_lineno, body[-1].end_col_offset):
                    return True
        return False

    def text(self) -> str:
        """The module's text with the change."""
        lines = (LIBRARY / self.module).read_text("utf-8").split("\n")
        line = lines[self.line - 1].encode()
        before = "\n".join([*lines[: self.line - 1], line[: self.column].decode()])
        after = "\n".join([line[self.column :].decode(), *lines[self.line :]])
        if not after.startswith(self.was):
            raise SystemExit(f"{self.module}:{self.line} is not {self.was!r} any more: start again")
        lines_kept = "\n" * self.was.count("\n")
        return f"{before}({self.now}{lines_kept}){after.removeprefix(self.was)}"


def _changed(node: ast.AST) -> ast.AST | None:
    """The node with one thing changed; None if it has nothing to change."""
    if not isinstance(node, ast.Compare | ast.BinOp | ast.BoolOp | ast.UnaryOp | ast.Constant):
        return None
    new = copy.deepcopy(node)
    if isinstance(new, ast.Compare) and type(new.ops[0]) in _COMPARE:
        new.ops[0] = _COMPARE[type(new.ops[0])]()
    elif isinstance(new, ast.BinOp) and type(new.op) in _ARITHMETIC:
        new.op = _ARITHMETIC[type(new.op)]()
    elif isinstance(new, ast.BoolOp):
        new.op = ast.Or() if isinstance(new.op, ast.And) else ast.And()
    elif isinstance(new, ast.UnaryOp) and isinstance(new.op, ast.Not):
        return new.operand
    elif isinstance(new, ast.Constant) and type(new.value) is int:
        new.value += 1
    elif isinstance(new, ast.Constant) and type(new.value) is bool:
        new.value = not new.value
    else:
        return None
    return new


def mutants_of(module: str) -> list[Mutant]:
    """Every mutant of a module."""
    text = (LIBRARY / module).read_text("utf-8")
    tree = ast.parse(text)
    annotations = {
        id(one)
        for node in ast.walk(tree)
        for name in ("annotation", "returns")
        if (value := getattr(node, name, None)) is not None
        for one in ast.walk(value)
    }
    found = []
    for node in ast.walk(tree):
        new = None if id(node) in annotations else _changed(node)
        if new is not None and _is_source(was := ast.get_source_segment(text, node), node):
            found.append(Mutant(module, node.lineno, node.col_offset, was, ast.unparse(new)))
    return found


def _is_source(text: str, node: ast.AST) -> bool:
    """Whether a text is that of a node; Python 3.11 misplaces nodes in f-strings."""
    try:
        return ast.unparse(ast.parse(f"({text})", mode="eval")) == ast.unparse(node)
    except SyntaxError:
        return False


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


def tried(module: str, mutants: list[Mutant]) -> Iterator[tuple[Mutant, bool]]:
    """Try mutants of one module; yields each of them and whether it was noticed."""
    inside = [mutant for mutant in mutants if mutant.in_function]
    lines = Lines(module)
    with tempfile.TemporaryFile() as results:
        trials = Trials(inside, lines, results.fileno())
        if _failed(lambda _: _pytest(LIBRARY.parent, MODULES[module], trials), math.inf):
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


def _chosen(modules: list[str], count: int, seed: int) -> list[Mutant]:
    """Random mutants, as many of each module, if it has so many."""
    shuffled = []
    for module in modules:
        found = mutants_of(module)
        shuffled.append(random.Random(f"{seed} {module}").sample(found, len(found)))
    turns = itertools.zip_longest(*shuffled)
    return [mutant for turn in turns for mutant in turn if mutant is not None][:count]


def main() -> None:
    """Try the mutants, and write what was noticed after each of them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, default=300)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--modules", nargs="*", default=list(MODULES), choices=MODULES)
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--unnoticed", action="store_true", help="try those of --results again")
    asked = parser.parse_args()
    if asked.unnoticed:
        result = json.loads(asked.results.read_text("utf-8"))
        known = [Mutant(**one) for one in result["unnoticed"]]
        chosen = [mutant for mutant in known if mutant.module in asked.modules]
    else:
        known, chosen = [], _chosen(asked.modules, asked.count, asked.seed)
        command = f"python tools/mutants.py --count {asked.count} --seed {asked.seed}"
        result = {"command": command, "tried": 0, "noticed_at_first": 0}
    chosen.sort(key=lambda mutant: asked.modules.index(mutant.module))
    for module, mutants in itertools.groupby(chosen, key=lambda mutant: mutant.module):
        for mutant, noticed in tried(module, list(mutants)):
            if not asked.unnoticed:
                result["tried"] += 1
                result["noticed_at_first"] += noticed
            if noticed:
                known = [one for one in known if one != mutant]
            else:
                known += [] if asked.unnoticed else [mutant]
                print(f"{module}:{mutant.line}: {mutant.was} -> {mutant.now}", flush=True)
            _write(asked.results, result, known)


def _write(path: Path, result: dict[str, Any], unnoticed: list[Mutant]) -> None:
    """Write the results with the scores: of all mutants, and of those that have an effect."""
    noticed = result["tried"] - len(unnoticed)
    result["noticed"] = noticed
    result["noticed_of_those_with_an_effect"] = round(
        noticed / max(1, result["tried"] - sum(bool(one.no_effect) for one in unnoticed)), 4
    )
    result["unnoticed"] = [
        {name: value for name, value in asdict(one).items() if value} for one in unnoticed
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
