"""The file of a view that lists the records of its bases that are not in it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.parquet as pq

from latentmill.errors import StoreError

if TYPE_CHECKING:
    from latentmill.store.store import LatentStore

LEFT_OUT_SCHEMA = pa.schema(
    [
        pa.field("key", pa.string(), nullable=False),
        pa.field("reason", pa.dictionary(pa.int32(), pa.string()), nullable=False),
        pa.field("detail", pa.string()),  # of a duplicate: the record that is kept
    ]
)


def read_left_out(view: LatentStore) -> pa.Table:
    """The records that a view leaves out, as `LEFT_OUT_SCHEMA`.

    Raises StoreError if the file is damaged.
    """
    path = view.info.left_out_file
    if path is None:
        return LEFT_OUT_SCHEMA.empty_table()
    try:
        with view.storage.open(path) as file:
            return pq.read_table(file).select(LEFT_OUT_SCHEMA.names).cast(LEFT_OUT_SCHEMA)
    except (pa.ArrowException, ValueError, LookupError) as error:
        raise StoreError(f"{view.url}/{path} is damaged: create the view again.") from error
