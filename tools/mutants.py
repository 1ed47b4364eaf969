"""How many random changes to core modules do the modules' own tests notice?

    python tools/mutants.py --count 300 --seed 1 --results tools/results/mutants.json
    python tools/mutants.py --unnoticed --results tools/results/mutants.json   # after new tests

Each mutant is one changed operator, comparison or constant. It counts as noticed if the tests of
its module fail or do not end in time. Mutants that cannot be noticed (in log lines, in speed) are
counted as unnoticed; look at the list. Takes minutes to hours; run by hand. Before the first mutant
the tests of each module must pass unchanged.
"""

from __future__ import annotations

import argparse
import ast
import copy
import itertools
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NoReturn

import duckdb  # noqa: F401  the forks have these already
import numpy as np  # noqa: F401
import pyarrow.parquet  # noqa: F401
import pytest
import ray  # noqa: F401
import torch  # noqa: F401
from hypothesis import Phase, settings

# Without shrinking: that a test fails is enough.
settings.register_profile(
    "mutants", deadline=None, max_examples=60, phases=[Phase.explicit, Phase.generate]
)

ROOT = Path(__file__).parents[1]
# Each module, and the tests that are about it.
MODULES = {
    "encoding/chunks.py": ["tests/encoding/test_chunks.py", "tests/encoding/test_stitch.py"],
    "plan/drafting.py": ["tests/plan"],
    "plan/compare.py": ["tests/run/test_extend.py"],
    "plan/sort.py": ["tests/plan"],
    "store/commit.py": ["tests/store/test_commit.py", "tests/store/test_writers.py"],
    "store/index.py": ["tests/store/test_index.py", "tests/store/test_index_damage.py"],
    "store/statistics.py": ["tests/store/test_statistics.py"],
    "ops/arithmetic.py": ["tests/ops"],
    "ops/origin.py": ["tests/ops"],
    "ops/time.py": ["tests/ops"],
    "reader/order.py": ["tests/reader/test_order.py"],
    "reader/crops.py": ["tests/reader/test_crops.py", "tests/reader/test_dataset.py"],
    "reader/sharding.py": ["tests/reader/test_ranks.py", "tests/reader/test_stream.py"],
    "reader/batches.py": ["tests/reader/test_batches.py"],
    "decoding/decoder.py": ["tests/decoding/test_decoder.py"],
    "sources/manifest.py": ["tests/sources/test_source_manifest.py"],
    "engine/dispatch.py": ["tests/engine/test_dispatch.py"],
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
    place: tuple[int, int, int, int]  # first line, its column, last line, its column
    was: str
    now: str


def _changed(node: ast.AST) -> ast.AST | None:
    """The node with one thing changed; None if it has nothing to change."""
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


def _nodes(tree: ast.Module) -> list[ast.AST]:
    annotations = {
        id(one)
        for node in ast.walk(tree)
        for field in ("annotation", "returns")
        if (value := getattr(node, field, None)) is not None
        for one in ast.walk(value)
    }
    return [
        node
        for node in ast.walk(tree)
        if hasattr(node, "lineno") and id(node) not in annotations and _changed(node) is not None
    ]


def mutants_of(module: str) -> list[Mutant]:
    """Every mutant of a module."""
    text = (ROOT / "pipeline" / "latentmill" / module).read_text(encoding="utf-8")
    return [
        Mutant(
            module,
            (node.lineno, node.col_offset, node.end_lineno, node.end_col_offset),
            ast.get_source_segment(text, node),
            ast.unparse(_changed(node)),
        )
        for node in _nodes(ast.parse(text))
    ]


def text_of(mutant: Mutant) -> str:
    """The module's text with the change."""
    text = (ROOT / "pipeline" / "latentmill" / mutant.module).read_text(encoding="utf-8")
    lines = text.split("\n")
    first, start, last, end = mutant.place
    # Offsets of `ast` count bytes of UTF-8.
    before = lines[first - 1].encode()[:start].decode()
    after = lines[last - 1].encode()[end:].decode()
    lines[first - 1 : last] = [f"{before}({mutant.now}){after}"]
    return "\n".join(lines)


def notices(module: str, text: str, timeout: float) -> bool:
    """Whether a module's tests fail on this text of it, or do not end in time.

    The tests run in a fork, so that PyTorch, Ray and others are imported once for all mutants.
    """
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(ROOT / "pipeline", Path(folder) / "pipeline")
        (Path(folder) / "pipeline" / "latentmill" / module).write_text(text, "utf-8")
        child = os.fork()
        if child == 0:
            os.setsid()
            _run_tests(Path(folder) / "pipeline", module)
        end = time.monotonic() + timeout
        status = 0
        while time.monotonic() < end:
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                return status != 0
            time.sleep(0.1)
        os.killpg(child, signal.SIGKILL)
        os.waitpid(child, 0)
    return True


def _run_tests(pipeline: Path, module: str) -> NoReturn:
    os.chdir(ROOT)
    nowhere = os.open(os.devnull, os.O_RDWR)
    for descriptor in range(3):
        os.dup2(nowhere, descriptor)
    os.environ["PYTHONPATH"] = str(pipeline)
    sys.path.insert(0, str(pipeline))
    options = ["-x", "-q", "-p", "no:cacheprovider", "--hypothesis-profile=mutants"]
    os._exit(pytest.main([*options, *MODULES[module]]))


def main() -> None:
    """Try the mutants, and write what was noticed after each of them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=300)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--timeout", type=float, default=300)
    parser.add_argument("--modules", nargs="*", default=list(MODULES))
    parser.add_argument("--results", type=Path)
    parser.add_argument("--unnoticed", action="store_true", help="try those of --results again")
    asked = parser.parse_args()
    if asked.unnoticed:
        result = json.loads(asked.results.read_text("utf-8"))
        chosen = [Mutant(**{**one, "place": tuple(one["place"])}) for one in result["unnoticed"]]
    else:
        chance = random.Random(asked.seed)
        modules = itertools.islice(itertools.cycle(asked.modules), asked.count)
        chosen = [chance.choice(mutants_of(module)) for module in modules]
        result = {
            "command": f"python tools/mutants.py --count {asked.count} --seed {asked.seed}",
            "tried": 0,
            "noticed_at_first": 0,
            "noticed": 0,
        }
    for module in dict.fromkeys(mutant.module for mutant in chosen):
        text = (ROOT / "pipeline" / "latentmill" / module).read_text("utf-8")
        if notices(module, text, asked.timeout):
            raise SystemExit(f"the tests of {module} fail without a change")
    unnoticed = []
    for number, mutant in enumerate(chosen, 1):
        noticed = notices(mutant.module, text_of(mutant), asked.timeout)
        result["noticed"] += noticed
        if not noticed:
            unnoticed.append(mutant)
            place = f"{mutant.module}:{mutant.place[0]}"
            print(f"unnoticed: {place}: {mutant.was} -> {mutant.now}", flush=True)
        if not asked.unnoticed:
            result |= {"tried": number, "noticed_at_first": result["noticed"]}
        left = unnoticed + chosen[number:] if asked.unnoticed else unnoticed
        result["unnoticed"] = [asdict(one) for one in left]
        if asked.results:
            asked.results.parent.mkdir(parents=True, exist_ok=True)
            asked.results.write_text(json.dumps(result, indent=2) + "\n", "utf-8")
    print(f"noticed {result['noticed']} of {result['tried']}")


if __name__ == "__main__":
    main()
