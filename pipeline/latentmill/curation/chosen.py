"""Records that were chosen from a store, and those that were left out."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from latentmill.store.index import Index
from latentmill.store.store import LatentStore

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Chosen:
    """Records of a store.

    Attributes:
        store: The store, which may be a view.
        index: The store's index.
        rows: Positions of the records in the index, ascending.
        left_out: The other records, as `LEFT_OUT_SCHEMA`.
        prefix: What is put before the keys.
    """

    store: LatentStore
    index: Index
    rows: Ints
    left_out: pa.Table
    prefix: str = ""
