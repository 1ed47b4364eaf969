"""Conditions on metadata, such as `genre == 'rock' and bpm > 100`: parsed, never executed.

The syntax is a subset of Python: names and `a.b` for fields, constants, lists, comparisons, `in`,
`and`, `or`, `not`.
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Mapping
from typing import Any

from latentmill.errors import ConfigError

MAX_LENGTH = 2000  # characters

_COMPARE: dict[type[ast.cmpop], Callable[[Any, Any], Any]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.In: lambda one, many: one in many,
    ast.NotIn: lambda one, many: one not in many,
    ast.Is: lambda one, other: one is other,
    ast.IsNot: lambda one, other: one is not other,
}
_ALLOWED = (
    *(ast.Expression, ast.BoolOp, ast.And, ast.Or, ast.UnaryOp, ast.Not, ast.USub),
    *(ast.Compare, ast.Name, ast.Attribute, ast.Load, ast.Constant, ast.List, ast.Tuple),
    *_COMPARE,
)


class Condition:
    """A condition on an item's metadata.

    A missing field is None. A comparison of values that cannot be compared, such as None and a
    number, is false, as in SQL. Raises ConfigError if the text is not a valid condition; `name` is
    that of the option in its message.
    """

    def __init__(self, text: str, name: str = "where") -> None:
        self.text = text
        try:
            if len(text) > MAX_LENGTH:
                raise ValueError(f"longer than {MAX_LENGTH} characters")
            self._tree = ast.parse(text.strip(), mode="eval").body
            for node in ast.walk(self._tree):
                if not isinstance(node, _ALLOWED):
                    raise ValueError("only comparisons with and, or, not are allowed")
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            cause = error.msg if isinstance(error, SyntaxError) else str(error)
            raise ConfigError(
                f"invalid {name} condition {text!r} ({cause}): write it like genre == 'rock' "
                "and bpm > 100."
            ) from error

    @property
    def fields(self) -> frozenset[str]:
        """The fields that it uses: `genre`, `tags.mood`."""
        inner = {id(n.value) for n in ast.walk(self._tree) if isinstance(n, ast.Attribute)}
        named = (n for n in ast.walk(self._tree) if isinstance(n, ast.Name | ast.Attribute))
        return frozenset(ast.unparse(node) for node in named if id(node) not in inner)

    def holds(self, metadata: Mapping[str, Any]) -> bool:
        """Whether the condition is true for an item's metadata."""
        return bool(_value(self._tree, metadata))


def _value(node: ast.AST, fields: Mapping[str, Any]) -> Any:  # noqa: PLR0911
    match node:
        case ast.Constant():
            return node.value
        case ast.Name():
            return fields.get(node.id)
        case ast.Attribute():
            inner = _value(node.value, fields)
            return inner.get(node.attr) if isinstance(inner, Mapping) else None
        case ast.List() | ast.Tuple():
            return [_value(part, fields) for part in node.elts]
        case ast.UnaryOp(op=ast.Not()):
            return not _value(node.operand, fields)
        case ast.UnaryOp():
            inner = _value(node.operand, fields)
            return -inner if isinstance(inner, int | float) else None
        case ast.BoolOp(op=ast.And()):
            return all(_value(part, fields) for part in node.values)
        case ast.BoolOp():
            return any(_value(part, fields) for part in node.values)
        case ast.Compare():
            left = _value(node.left, fields)
            for compare, part in zip(node.ops, node.comparators, strict=True):
                right = _value(part, fields)
                try:
                    if not _COMPARE[type(compare)](left, right):
                        return False
                except TypeError:
                    return False
                left = right
            return True
    raise AssertionError(type(node))
