"""The fields of a Parquet shard's records beside their latents."""

from __future__ import annotations

from typing import Any

import pyarrow.parquet as pq

from latentmill.storage import Storage
from latentmill.store.schema import RECORD_SCHEMA

_FIELD_COLUMNS = [name for name in RECORD_SCHEMA.names if name != "latent"]


class ShardFields:
    """The columns beside the latents of one Parquet shard, read once."""

    def __init__(self, storage: Storage, path: str) -> None:
        with storage.open(path) as file:
            have = set(pq.read_schema(file).names)  # a store of an earlier version has fewer
            self._table = pq.read_table(
                file,
                columns=[name for name in _FIELD_COLUMNS if name in have],
                page_checksum_verification=True,
                # Arrow's threads may abort a process that ends soon after they began.
                use_threads=False,
                pre_buffer=False,
            )

    def row(self, row: int) -> dict[str, Any]:
        """The fields of one row by name."""
        fields: dict[str, Any] = self._table.slice(row, 1).to_pylist()[0]
        return fields
