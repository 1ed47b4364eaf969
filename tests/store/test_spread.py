"""Rows that are spread over a store."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from latentmill.store.spread import spread_rows


@given(st.integers(1, 500), st.integers(1, 60), st.integers(0, 4))
def test_they_are_evenly_spread_from_the_first_to_the_last(
    rows: int, count: int, spares: int
) -> None:
    found = spread_rows(rows, count, spares)
    assert len(set(found)) == len(found)
    assert all(0 <= row < rows for row in found)
    first = found[: min(rows, count)]
    assert first == sorted(first)
    assert first[0] == 0
    if len(first) > 1:
        assert first[-1] == rows - 1
        gaps = [after - before for before, after in itertools.pairwise(first)]
        assert max(gaps) - min(gaps) <= 1
    assert len(found) >= min(rows, count * (1 + spares))
    assert spares or found == first


def test_there_are_no_rows() -> None:
    assert spread_rows(0, 3) == []
