"""Choosing some records from all parts of a store."""

from __future__ import annotations

import numpy as np


def spread_rows(rows: int, count: int, spares: int = 0) -> list[int]:
    """Numbers of up to `count` of `rows` rows, evenly from the first to the last.

    After them follow about `spares` times as many others between them, in place of rows that
    cannot be used.
    """
    first, more = (
        np.unique(np.linspace(0, rows - 1, min(rows, most)).astype(np.int64)).tolist()
        for most in (count, count * (1 + spares))
    )
    chosen = set(first)
    return [*first, *(row for row in more if row not in chosen)]
