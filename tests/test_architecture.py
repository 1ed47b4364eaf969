"""The order of the modules, as the table in docs/design.md has it."""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
LIBRARY = ROOT / "pipeline" / "latentmill"
TABLE = re.compile(r"^\| `(\w+)(?:/|\.py)` \|", re.MULTILINE)
# Who may import ray: `engine/`, and the module that runs Ray Train.
WITH_RAY = ("engine/", "training/job.py")


def order() -> list[str]:
    return TABLE.findall((ROOT / "docs" / "design.md").read_text(encoding="utf-8"))


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """Line and full name of everything that a module imports, at its top or later."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def module_of(path: Path) -> str:
    return path.relative_to(LIBRARY).with_suffix("").parts[0]


def modules() -> list[Path]:
    return [
        path
        for path in sorted(LIBRARY.rglob("*.py"))
        if path.parent != LIBRARY or path.name not in ("__init__.py", "__main__.py")
    ]


def test_the_table_names_every_module_once() -> None:
    named = order()
    assert len(named) == len(set(named))
    assert set(named) == {module_of(path) for path in modules()}


def test_modules_import_only_what_stands_above_them() -> None:
    place = {name: number for number, name in enumerate(order())}
    wrong = [
        f"{path.relative_to(LIBRARY)}:{line} imports {name}"
        for path in modules()
        for line, name in imports(path)
        if name.startswith("latentmill.")
        and name != "latentmill.__version__"
        and place[name.split(".")[1]] > place[module_of(path)]
    ]
    assert not wrong, "\n".join(wrong)


def test_only_the_engine_and_the_training_job_import_ray() -> None:
    wrong = [
        f"{path.relative_to(LIBRARY)}:{line}"
        for path in modules()
        for line, name in imports(path)
        if name.split(".")[0] == "ray" and not str(path.relative_to(LIBRARY)).startswith(WITH_RAY)
    ]
    assert not wrong, "\n".join(wrong)


def test_files_are_short() -> None:
    lengths = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in modules()}
    assert not {str(path.relative_to(LIBRARY)): n for path, n in lengths.items() if n > 400}


def test_no_two_classes_have_the_same_name() -> None:
    """One word, one meaning. `python tools/structure.py` lists such names."""
    found = Counter(
        node.name
        for path in modules()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ClassDef)
    )
    assert not [name for name, count in found.items() if count > 1]
