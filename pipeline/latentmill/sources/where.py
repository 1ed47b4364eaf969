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
            self.tree = ast.parse(text.strip(), mode="eval").body
            for node in ast.walk(self.tree):
                if not isinstance(node, _ALLOWED):
                    raise ValueError("only comparisons with and, or, not are allowed")
            self._value = _value(self.tree)
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            cause = error.msg if isinstance(error, SyntaxError) else str(error)
            raise ConfigError(
                f"invalid {name} condition {text!r} ({cause}): write it like genre == 'rock' "
                "and bpm > 100."
            ) from error

    @property
    def fields(self) -> frozenset[str]:
        """The fields that it uses: `genre`, `tags.mood`."""
        inner = {id(n.value) for n in ast.walk(self.tree) if isinstance(n, ast.Attribute)}
        named = (n for n in ast.walk(self.tree) if isinstance(n, ast.Name | ast.Attribute))
        return frozenset(ast.unparse(node) for node in named if id(node) not in inner)

    def holds(self, metadata: Mapping[str, Any]) -> bool:
        """Whether the condition is true for an item's metadata."""
        return bool(self._value(metadata))

    def __reduce__(self) -> tuple[type[Condition], tuple[str]]:
        return Condition, (self.text,)


_Value = Callable[[Mapping[str, Any]], Any]


def _value(node: ast.AST) -> _Value:  # noqa: PLR0911
    """The function that computes a node's value from the fields; faster than walking the tree."""
    match node:
        case ast.Constant(value=constant):
            return lambda fields: constant
        case ast.Name(id=name):
            return lambda fields: fields.get(name)
        case ast.Attribute():
            return _member(_value(node.value), node.attr)
        case ast.List() | ast.Tuple():
            parts = [_value(part) for part in node.elts]
            return lambda fields: [part(fields) for part in parts]
        case ast.UnaryOp(op=ast.Not()):
            operand = _value(node.operand)
            return lambda fields: not operand(fields)
        case ast.UnaryOp():
            return _negative(_value(node.operand))
        case ast.BoolOp(op=op):
            parts = [_value(part) for part in node.values]
            every = all if isinstance(op, ast.And) else any
            return lambda fields: every(part(fields) for part in parts)
        case ast.Compare():
            return _comparison(node)
    raise AssertionError(type(node))


def _member(outer: _Value, name: str) -> _Value:
    def value(fields: Mapping[str, Any]) -> Any:
        inner = outer(fields)
        return inner.get(name) if isinstance(inner, Mapping) else None

    return value


def _negative(operand: _Value) -> _Value:
    def value(fields: Mapping[str, Any]) -> Any:
        inner = operand(fields)
        return -inner if isinstance(inner, int | float) else None

    return value


def _comparison(node: ast.Compare) -> _Value:
    first = _value(node.left)
    compare = [_COMPARE[type(op)] for op in node.ops]
    rest = list(zip(compare, map(_value, node.comparators), strict=True))

    def value(fields: Mapping[str, Any]) -> bool:
        left = first(fields)
        for holds, part in rest:
            right = part(fields)
            try:
                if not holds(left, right):
                    return False
            except TypeError:
                return False
            left = right
        return True

    return value
