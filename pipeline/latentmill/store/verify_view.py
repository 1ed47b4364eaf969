"""Checking that a view matches its base stores."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from latentmill.errors import LatentmillError
from latentmill.store.metadata_file import open_metadata
from latentmill.store.prefetch import prefetched
from latentmill.store.schema import DATASET_PATH
from latentmill.store.seal import read_origin
from latentmill.store.store import LatentStore

_HINT = "create the view again"
_DAMAGED = (OSError, ValueError, LookupError, pa.ArrowException)  # of Parquet files


def view_faults(store: LatentStore) -> Iterator[str]:
    """The faults of a view, a line each: its own files, and the records in its bases."""
    info, own = store.info, f"{store.url}/{store.info.index}"
    data = store.storage.read_if_exists(info.index)
    if data is None or xxhash.xxh3_128_hexdigest(data) != info.index_hash:
        yield f"{own} is missing or damaged: {_HINT}"
        return
    try:
        index = store.index
    except LatentmillError as error:  # a base has changed
        yield str(error).rstrip(".")
        return
    try:
        if store.annotations is not None:
            store.annotations.check()
    except LatentmillError as error:
        yield str(error).rstrip(".")
        return
    left_out = sum(info.left_out.values())
    counted = (len(index), left_out, 0, len(index) + left_out)
    if (info.encoded, info.skipped, info.failed, info.items) != counted:
        yield f"{store.url}/{DATASET_PATH} does not have the counts of its records: {_HINT}"
    try:
        if read_origin(store.storage).shape[0] != len(info.mean):
            yield f"{store.url}/{info.origin} does not match the model: {_HINT}"
        metadata = open_metadata(store)
        if metadata is None or not _has_keys(metadata, store):
            yield f"{store.url}/{info.metadata} does not have the records of the index: {_HINT}"
        if info.left_out_file is not None and not _has_rows(store, info.left_out_file, left_out):
            yield f"{store.url}/{info.left_out_file} is missing or damaged: {_HINT}"
    except LatentmillError as error:
        yield str(error).rstrip(".")
    order, _ = index.by_shard()
    for entry in prefetched(store, map(index.entry, order.tolist())):
        try:
            latent = store.read(entry).latent
        except LatentmillError as error:
            yield str(error).rstrip(".")
            continue
        if not np.isfinite(latent).all():
            yield f"the latent of {entry.key} contains NaN or Inf"


def _has_keys(metadata: pq.ParquetFile, store: LatentStore) -> bool:
    try:
        with metadata as file:
            keys = file.read(columns=["key"], use_threads=False)["key"]
    except _DAMAGED:
        return False
    return store.index.has_keys(keys)


def _has_rows(store: LatentStore, path: str, rows: int) -> bool:
    data = store.storage.read_if_exists(path)
    if data is None or xxhash.xxh3_128_hexdigest(data)[:16] != path.split(".")[1]:
        return False
    try:
        with pq.ParquetFile(pa.BufferReader(data)) as file:
            return bool(file.metadata.num_rows == rows)
    except _DAMAGED:
        return False
