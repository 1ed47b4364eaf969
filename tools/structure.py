"""How large the library is, which private functions are called once, which names are ambiguous.

    python tools/structure.py [FOLDER]

Lines of code are lines that hold a token of code: no docstrings, comments or blank lines. Words of
the former private vocabulary are counted in the names of functions, classes and variables, except
in names that are standard terms.
"""

from __future__ import annotations

import ast
import io
import re
import sys
import tokenize
from collections import Counter
from pathlib import Path

LIBRARY = Path(__file__).parents[1] / "pipeline" / "latentmill"
LONG = 40  # lines of a function
FORMER_WORDS = {
    *("ahead", "ask", "careful", "closing", "feed", "hear", "heard", "house", "listen"),
    *("listener", "meter", "mend", "room", "seat", "street", "watch", "watcher"),
}
# Names in which such a word is a standard term: a level meter of audio engineering. The cells of
# tables (`TableCell`) are one, too, so `cells` is not in the list.
STANDARD = {"LevelMeter"}
_NO_CODE = {
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENCODING,
    tokenize.ENDMARKER,
}
_WORD = re.compile("[A-Z]?[a-z]+")
_Function = ast.FunctionDef | ast.AsyncFunctionDef


def docstring_lines(tree: ast.Module) -> set[int]:
    """Lines of docstrings."""
    lines: set[int] = set()
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        for statement in body if isinstance(body, list) else ():
            if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant):
                lines.update(range(statement.lineno, (statement.end_lineno or 0) + 1))
    return lines


def code_lines(text: str) -> int:
    """Lines of a module that hold code."""
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in _NO_CODE:
            lines.update(range(token.start[0], token.end[0] + 1))
    return len(lines - docstring_lines(ast.parse(text)))


def names_given(nodes: list[ast.AST]) -> list[str]:
    """The names of functions, classes, arguments and assigned variables."""
    names = [node.name for node in nodes if isinstance(node, _Function | ast.ClassDef)]
    names += [node.arg for node in nodes if isinstance(node, ast.arg)]
    stored = [node for node in nodes if isinstance(getattr(node, "ctx", None), ast.Store)]
    names += [node.id for node in stored if isinstance(node, ast.Name)]
    return names + [node.attr for node in stored if isinstance(node, ast.Attribute)]


def main(folder: Path) -> None:
    """Print the figures of a library."""
    texts = {path: path.read_text(encoding="utf-8") for path in sorted(folder.rglob("*.py"))}
    trees = {path: ast.parse(text) for path, text in texts.items()}
    nodes = [node for tree in trees.values() for node in ast.walk(tree)]
    functions = [node for node in nodes if isinstance(node, _Function)]
    used = Counter(node.id for node in nodes if isinstance(node, ast.Name))
    used.update(node.attr for node in nodes if isinstance(node, ast.Attribute))
    private = [one.name for one in functions if one.name.startswith("_") and one.name[1] != "_"]
    long = [one for one in functions if (one.end_lineno or 0) - one.lineno >= LONG]
    classes = Counter(node.name for node in nodes if isinstance(node, ast.ClassDef))
    twice = sorted(name for name, count in classes.items() if count > 1)
    names = [name for name in names_given(nodes) if name not in STANDARD]
    words = [word.lower() for name in names for word in _WORD.findall(name)]
    former = Counter(word for word in words if word in FORMER_WORDS)
    print(f"modules: {len(texts)}, at the top: {len(list(folder.glob('*.py')))}")
    print(f"lines of code: {sum(map(code_lines, texts.values()))}")
    print(f"functions: {len(functions)}, of over {LONG} lines: {len(long)}")
    print(f"private functions: {len(private)}, used once: {sum(used[n] == 1 for n in private)}")
    print(f"names of several classes: {', '.join(twice) or 'none'}")
    print(f"former words in names: {former.total()} ({', '.join(sorted(former)) or 'none'})")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else LIBRARY)
