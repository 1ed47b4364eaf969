"""Opening metadata.parquet of a sealed store."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pyarrow as pa
import xxhash

from latentmill.errors import StorageError, StoreError
from latentmill.store.commit import HASH_BLOCK
from latentmill.store.store import LatentStore


def open_metadata(store: LatentStore) -> pa.Buffer | None:
    """The bytes of a store's metadata file, mapped into memory and checked by their hash.

    None for a store without one: it is not sealed, or an earlier version sealed it. The file of a
    remote store is downloaded to a temporary file, which has no name any more when it is mapped.

    Raises:
        StoreError: The file is missing or damaged.
        StorageError: It cannot be read.
    """
    path = store.info.metadata if store.sealed else None
    if path is None:
        return None
    try:
        if store.storage.local:
            data = mapped(Path(store.storage.full(path)))
        else:
            with tempfile.TemporaryDirectory(prefix="latentmill-") as folder:
                file = Path(folder, "metadata")
                with store.storage.open(path) as remote, file.open("wb") as local:
                    while block := remote.read(HASH_BLOCK):
                        local.write(block)
                data = mapped(file)
    except (OSError, StorageError) as error:
        missing = isinstance(error.__cause__ or error, FileNotFoundError)
        if missing and store.reload():  # sealed again meanwhile
            return open_metadata(store)
        if isinstance(error, StorageError) and not missing:
            raise
        raise damaged_metadata(store) from error
    if xxhash.xxh3_128_hexdigest(data) != store.info.metadata_hash:
        raise damaged_metadata(store)
    return data


def mapped(file: Path) -> pa.Buffer:
    return pa.memory_map(str(file)).read_buffer()


def damaged_metadata(store: LatentStore) -> StoreError:
    """The error for a missing or damaged metadata file."""
    return StoreError(
        f"{store.url}/{store.info.metadata} is missing or damaged: run the same encode command "
        "again to recreate it."
    )
