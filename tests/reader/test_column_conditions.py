"""Conditions on columns choose the rows that the same condition on each record's values chooses."""

from __future__ import annotations

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from latentmill.reader.column_conditions import rows_where
from latentmill.sources.where import Condition

COLUMNS = {
    "genre": (pa.string(), st.sampled_from(["", "rock", "jazz", "Äther", "\U0001f3b5", "z"])),
    "bpm": (pa.float64(), st.sampled_from([0.0, -0.0, 60.0, 120.5, float("nan"), float("inf")])),
    "year": (pa.int64(), st.sampled_from([-1, 0, 60, 1999, 2**40, -(2**62)])),
    "vocal": (pa.bool_(), st.booleans()),
}
NAMES = st.sampled_from(sorted(COLUMNS))
TEXTS = st.sampled_from(["''", "'rock'", "'Äther'", "'{'", "'\U0001f3b5'", "'\\ud800'"])
NUMBERS = st.sampled_from(["0", "60", "-1", "1999", "60.0", "120.5", "-0.5", "9007199254740993"])
CONSTANTS = st.one_of(TEXTS, NUMBERS, st.sampled_from(["None", "True"]))
LISTS = st.lists(CONSTANTS, max_size=3).map(lambda some: f"[{', '.join(some)}]")
ORDERS = st.sampled_from(["==", "!=", "<", "<=", ">", ">="])
COMPARISONS = st.one_of(
    st.tuples(NAMES, ORDERS, CONSTANTS).map(" ".join),
    st.tuples(CONSTANTS, ORDERS, NAMES).map(" ".join),
    st.tuples(CONSTANTS, ORDERS, NAMES, ORDERS, CONSTANTS).map(" ".join),
    st.tuples(NAMES, ORDERS, NAMES).map(" ".join),
    st.tuples(NAMES, st.sampled_from(["in", "not in"]), LISTS).map(" ".join),
    st.tuples(NAMES, st.sampled_from(["is None", "is not None"])).map(" ".join),
    NAMES,
)
CONDITIONS = st.recursive(
    COMPARISONS,
    lambda inner: st.one_of(
        inner.map(lambda one: f"not ({one})"),
        st.tuples(inner, inner).map(lambda two: f"({two[0]}) and ({two[1]})"),
        st.tuples(inner, inner).map(lambda two: f"({two[0]}) or ({two[1]})"),
    ),
    max_leaves=4,
)
ROWS = st.lists(
    st.fixed_dictionaries({name: st.none() | values for name, (_, values) in COLUMNS.items()}),
    min_size=1,
    max_size=6,
)


def columns(rows: list[dict[str, object]]) -> dict[str, pa.ChunkedArray]:
    return {
        name: pa.chunked_array([[row[name] for row in some] for some in (rows[:2], rows[2:])], kind)
        for name, (kind, _) in COLUMNS.items()
    }


@settings(max_examples=400, deadline=None)
@given(CONDITIONS, ROWS)
def test_the_rows_are_those_for_which_the_condition_holds(
    text: str, rows: list[dict[str, object]]
) -> None:
    condition = Condition(text)
    found = rows_where(condition.tree, columns(rows))
    if found is not None:
        assert found.tolist() == [condition.holds(row) for row in rows]


@pytest.mark.parametrize(
    "text",
    [
        "genre == 'rock' and bpm > 100",
        "not (genre != 'rock' or year <= 1999)",
        "60 <= bpm < 120.5",
        "genre in ['rock', 'jazz']",
        "year not in [-1, 60] and bpm is not None",
    ],
)
def test_usual_conditions_need_no_loop(text: str) -> None:
    rows = [dict.fromkeys(COLUMNS), {"genre": "rock", "bpm": 110.0, "year": 2001, "vocal": True}]
    found = rows_where(Condition(text).tree, columns(rows))
    assert found is not None
    assert found.tolist() == [Condition(text).holds(row) for row in rows]


@pytest.mark.parametrize(
    "text",
    ["vocal", "genre == 5", "bpm == year", "year > 1.5", "vocal == 1", "year == (not 5)"],
)
def test_other_conditions_are_left_to_the_loop(text: str) -> None:
    assert rows_where(Condition(text).tree, columns([dict.fromkeys(COLUMNS)])) is None


@pytest.mark.parametrize("value", [2**31 - 1, -(2**31) + 1, 2**31, 2**32 - 1, -(2**31)])
def test_numbers_that_a_column_of_four_bytes_may_not_have_are_left_to_the_loop(value: int) -> None:
    frames = [1, 2**31 - 1, None]
    condition = Condition(f"frames >= {value}")
    found = rows_where(condition.tree, {"frames": pa.chunked_array([frames], pa.int32())})
    if abs(value) < 2**31:
        assert found is not None
        assert found.tolist() == [condition.holds({"frames": one}) for one in frames]
    else:
        assert found is None
