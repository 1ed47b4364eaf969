"""Conditions on typed columns, evaluated for all rows at once instead of row after row."""

from __future__ import annotations

import ast
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

Mask = npt.NDArray[np.bool_]

_COMPARE = {
    ast.Eq: "equal",
    ast.NotEq: "not_equal",
    ast.Lt: "less",
    ast.LtE: "less_equal",
    ast.Gt: "greater",
    ast.GtE: "greater_equal",
}
_SWAPPED: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.Gt,
    ast.LtE: ast.GtE,
    ast.Gt: ast.Lt,
    ast.GtE: ast.LtE,
}
_EXACT = 2**53  # whole numbers up to this are exact as floats


def rows_where(tree: ast.expr, columns: Mapping[str, pa.ChunkedArray]) -> Mask | None:
    """The rows for which a parsed `Condition` holds, with the same result as `Condition.holds`.

    None if the condition has a part whose result Arrow does not define as Python does: a comparison
    of values of different types, of two columns, or a value that is not compared.
    """
    try:
        return _mask(tree, columns)
    except _NotColumnarError:
        return None


class _NotColumnarError(Exception):
    pass


def _mask(node: ast.expr, columns: Mapping[str, pa.ChunkedArray]) -> Mask:
    match node:
        case ast.BoolOp(op=op, values=values):
            masks = [_mask(value, columns) for value in values]
            every = np.logical_and if isinstance(op, ast.And) else np.logical_or
            return np.asarray(every.reduce(masks))
        case ast.UnaryOp(op=ast.Not(), operand=operand):
            return ~_mask(operand, columns)
        case ast.Compare(left=left, ops=ops, comparators=comparators):
            pairs = zip([left, *comparators], ops, comparators, strict=False)
            return np.asarray(np.logical_and.reduce([_compared(*pair, columns) for pair in pairs]))
    raise _NotColumnarError


def _compared(
    left: ast.expr, op: ast.cmpop, right: ast.expr, columns: Mapping[str, pa.ChunkedArray]
) -> Mask:
    kind = type(op)
    if isinstance(right, ast.Name) and not isinstance(op, ast.In | ast.NotIn):
        left, right, kind = right, left, _SWAPPED.get(kind, kind)
    if not isinstance(left, ast.Name):
        raise _NotColumnarError
    column = columns[left.id]
    if isinstance(right, ast.List | ast.Tuple) and kind in (ast.In, ast.NotIn):
        values = pa.array([_fitting(one, column.type) for one in right.elts], column.type)
        found = _filled(pc.is_in(column, value_set=values), False)
        return found if kind is ast.In else ~found
    if isinstance(right, ast.Constant) and right.value is None and kind in (ast.Is, ast.IsNot):
        missing = _filled(pc.is_null(column), False)
        return missing if kind is ast.Is else ~missing
    if kind not in _COMPARE:
        raise _NotColumnarError
    value = pa.scalar(_fitting(right, column.type), column.type)
    # As in Python, a missing value differs from any other, and no other comparison with it holds.
    return _filled(pc.call_function(_COMPARE[kind], [column, value]), kind is ast.NotEq)


def _fitting(node: ast.expr, kind: pa.DataType) -> Any:
    """The value of a constant, if a column of a type can have it without being converted."""
    negative = isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub)
    constant = node.operand if isinstance(node, ast.UnaryOp) and negative else node
    value = constant.value if isinstance(constant, ast.Constant) else None
    if pa.types.is_string(kind) and isinstance(value, str) and not negative:
        try:
            value.encode()
        except UnicodeEncodeError:  # Arrow has no such text
            raise _NotColumnarError from None
        return value
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise _NotColumnarError
    number = -value if negative else value
    if pa.types.is_integer(kind) and isinstance(number, int) and abs(number) < 2**31:
        return number
    if pa.types.is_float64(kind) and abs(number) <= _EXACT:
        return float(number)
    raise _NotColumnarError


def _filled(found: Any, missing: bool) -> Mask:
    return np.asarray(pc.fill_null(found, missing).to_numpy())
