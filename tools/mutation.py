"""Mutants of a module: each is one changed operator, comparison or constant."""

from __future__ import annotations

import ast
import copy
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
LIBRARY = ROOT / "pipeline" / "latentmill"
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
