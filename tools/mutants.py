"""How many random changes to core modules do the modules' own tests notice?

    python tools/mutants.py --count 300 --seed 1 --results tools/results/mutants.json

Each mutant is one changed operator, comparison or constant. It counts as noticed if the tests of
its module fail or do not end in time. Mutants that cannot be noticed (in log lines, in speed) are
counted as unnoticed; look at the list. Takes minutes to hours; run by hand.
"""

from __future__ import annotations

import argparse
import ast
import copy
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

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
    line: int
    was: str
    now: str
    noticed: bool = False


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


def mutate(module: str, chance: random.Random) -> tuple[str, Mutant]:
    """The module's text with one change, and what it is."""
    text = (ROOT / "pipeline" / "latentmill" / module).read_text(encoding="utf-8")
    lines = text.split("\n")
    node = chance.choice(_nodes(ast.parse(text)))
    old, new = ast.get_source_segment(text, node), f"({ast.unparse(_changed(node))})"
    first, last = node.lineno - 1, node.end_lineno - 1
    # Offsets of `ast` count bytes of UTF-8.
    before = lines[first].encode()[: node.col_offset].decode()
    after = lines[last].encode()[node.end_col_offset :].decode()
    lines[first : last + 1] = [before + new + after]
    return "\n".join(lines), Mutant(module, node.lineno, old, new)


def notices(mutant: Mutant, text: str, timeout: float) -> bool:
    """Whether the module's tests fail on this text of it."""
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(ROOT / "pipeline", Path(folder) / "pipeline")
        (Path(folder) / "pipeline" / "latentmill" / mutant.module).write_text(text, "utf-8")
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider"]
        environment = {**os.environ, "PYTHONPATH": f"{folder}/pipeline"}
        try:
            ended = subprocess.run(
                [*command, *MODULES[mutant.module]],
                cwd=ROOT,
                env=environment,
                timeout=timeout,
                capture_output=True,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return True
    return ended.returncode != 0


def main() -> None:
    """Try the mutants, and write what was noticed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=300)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--timeout", type=float, default=300)
    parser.add_argument("--modules", nargs="*", default=list(MODULES))
    parser.add_argument("--results", type=Path)
    asked = parser.parse_args()
    chance = random.Random(asked.seed)
    done: list[Mutant] = []
    for number in range(asked.count):
        text, mutant = mutate(asked.modules[number % len(asked.modules)], chance)
        noticed = notices(mutant, text, asked.timeout)
        done.append(Mutant(**{**asdict(mutant), "noticed": noticed}))
        if not noticed:
            print(f"unnoticed: {mutant.module}:{mutant.line}: {mutant.was} -> {mutant.now}")
    found = Counter(one.module for one in done if one.noticed)
    total = Counter(one.module for one in done)
    print(f"noticed {found.total()} of {total.total()}, {found.total() / total.total():.0%}")
    if asked.results:
        asked.results.parent.mkdir(parents=True, exist_ok=True)
        result = {
            "command": f"python tools/mutants.py --count {asked.count} --seed {asked.seed}",
            "noticed": found.total(),
            "of": total.total(),
            "modules": {name: [found[name], total[name]] for name in total},
            "unnoticed": [asdict(one) for one in done if not one.noticed],
        }
        asked.results.write_text(json.dumps(result, indent=2) + "\n", "utf-8")


if __name__ == "__main__":
    main()
