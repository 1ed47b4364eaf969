"""Opening metadata.parquet of a store."""

from __future__ import annotations

import difflib
import tempfile
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from latentmill.errors import ConfigError, StorageError, StoreError
from latentmill.storage.remote import was_removed
from latentmill.store.commit import HASH_BLOCK, hash_of
from latentmill.store.metadata import METADATA_SCHEMA, write_metadata
from latentmill.store.store import LatentStore


def open_metadata(store: LatentStore) -> pq.ParquetFile | None:
    """A store's metadata file, checked by its hash; see `_source`."""
    source = _source(store)
    try:
        return None if source is None else pq.ParquetFile(source)
    except (OSError, pa.ArrowException) as error:
        raise damaged_metadata(store) from error


def _source(store: LatentStore) -> pa.NativeFile | None:
    """The bytes of a store's metadata file, checked by their hash.

    None for a store without one: it is not sealed, or an earlier version sealed it. The file of a
    remote store is downloaded to a temporary file, which has no name any more when it is open.

    Raises:
        StoreError: The file is missing or damaged.
        StorageError: It cannot be read.
    """
    path = store.info.metadata if store.sealed else None
    if path is None:
        return None
    try:
        if store.storage.local:
            file = _opened(Path(store.storage.full(path)))
        else:
            with tempfile.TemporaryDirectory(prefix="latentmill-") as folder:
                copy = Path(folder, "metadata")
                with store.storage.open(path) as remote, copy.open("wb") as local:
                    while block := remote.read(HASH_BLOCK):
                        local.write(block)
                file = _opened(copy)
        if hash_of(file) != store.info.metadata_hash:
            raise damaged_metadata(store)
        return file
    except (OSError, StorageError) as error:
        missing = was_removed(error.__cause__ or error)
        if missing and store.reload():  # sealed again meanwhile
            return _source(store)
        if isinstance(error, StorageError) and not missing:
            raise
        raise damaged_metadata(store) from error


def metadata_of(store: LatentStore) -> pq.ParquetFile:
    """A store's metadata file with a row for each record of its index; see `metadata_source`."""
    return pq.ParquetFile(metadata_source(store))


def read_table(store: LatentStore, columns: Sequence[str] | None) -> pa.Table:
    """Some columns of a store's metadata file, or all; see `LatentStore.table`."""
    file = metadata_of(store)
    names = file.schema_arrow.names
    for name in columns or ():
        if name not in names:
            near = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
            hint = f"did you mean {' or '.join(near)}?" if near else f"use {', '.join(names)}."
            raise ConfigError(f"{store.url} has no column {name!r}: {hint}")
    wanted = names if columns is None else list(columns)
    try:
        return file.read(columns=wanted, use_threads=False).select(wanted)
    except (OSError, ValueError, pa.ArrowException) as error:
        raise damaged_metadata(store) from error


def metadata_source(store: LatentStore) -> pa.NativeFile:
    """The bytes of a store's metadata file with a row for each record of its index.

    For a store without one, it is written to a temporary file, which has no name any more when it
    is open, so nothing is left when the process ends.

    Raises:
        StoreError: The file is missing or damaged.
        StorageError: A shard is damaged, or a file cannot be read or written.
    """
    source = _source(store)
    if source is None:
        with tempfile.TemporaryDirectory(prefix="latentmill-") as folder:
            file = Path(folder, "metadata")
            write_metadata(store.storage, store.index, file, Path(folder, "rows"))
            source = _opened(file)
    try:
        footer = pq.read_metadata(source)
    except (OSError, pa.ArrowException) as error:
        raise damaged_metadata(store) from error
    types = {field.name: field.type for field in footer.schema.to_arrow_schema()}
    whole = all(types.get(field.name) == field.type for field in METADATA_SCHEMA)
    if footer.num_rows != len(store.index) or not whole:
        raise damaged_metadata(store)
    return source


def _opened(file: Path) -> pa.NativeFile:
    """Open for positioned reads. If a mapped file was truncated, reading it would end the process.

    The file stays open without its name.
    """
    return pa.OSFile(str(file))


def damaged_metadata(store: LatentStore) -> StoreError:
    """The error for a missing or damaged metadata file."""
    what = "create the view again" if store.bases else "run the same encode command again"
    return StoreError(
        f"{store.url}/{store.info.metadata} is missing or damaged: {what} to recreate it."
    )
