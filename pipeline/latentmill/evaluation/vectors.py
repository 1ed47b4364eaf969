"""Pooled latents of all records, kept in evaluation/vectors.HASH.npy for finding neighbours."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import xxhash

from latentmill.errors import StorageError, StoreError
from latentmill.evaluation.channels import Pooling
from latentmill.evaluation.shard_pass import ShardPass, used_frames
from latentmill.record import FloatArray, Latent
from latentmill.storage.storage import Storage, writing
from latentmill.store.commit import hash_of
from latentmill.store.measurement import EVALUATION, current_result
from latentmill.store.metadata import has_hash
from latentmill.store.results import PooledVectors, StoreStatistics
from latentmill.store.store import LatentStore

_NAME = re.compile(r"vectors\.[0-9a-f]{16}\.npy")
_BLOCK = 1 << 16  # rows that are read at once: 8 MiB

npy: Any = np.lib.format  # without type hints
Half = npt.NDArray[np.float16]


def write_vectors(storage: Storage, vectors: Half) -> PooledVectors:
    """Write the vectors `[records, 64]` of all records; the result goes into statistics.json."""
    with storage.scratch_file("vectors.npy") as file:
        with writing(str(file)), file.open("wb") as out:
            np.save(out, vectors, allow_pickle=False)
        with file.open("rb") as written:
            digest = hash_of(written)
        path = f"{EVALUATION}/vectors.{digest[:16]}.npy"
        if not storage.publish(file, path) and not has_hash(storage, path, digest):
            storage.delete(path)  # named by its hash, so it is damaged
            storage.publish(file, path)
    return PooledVectors(file=path, hash=digest)


def remove_other_vectors(storage: Storage, vectors: PooledVectors) -> None:
    """Remove the vectors of earlier results."""
    for name in storage.list(EVALUATION):
        if _NAME.fullmatch(name) and f"{EVALUATION}/{name}" != vectors.file:
            storage.delete(f"{EVALUATION}/{name}")


def pooled(store: LatentStore, latent: Latent) -> FloatArray:
    """The vector `[64]` of a latent of this store."""
    parts = [chunk[:, : used_frames(chunk)] for chunk in latent] if latent.ndim == 3 else [latent]
    frames = np.concatenate(parts, axis=1).T.astype(np.float32)  # [F, D]
    pooling = ShardPass(store).pooling
    positions, _ = pooling(torch.from_numpy(frames), np.array([len(frames)]))
    vector: FloatArray = positions[0]
    return vector


class StoredVectors:
    """The vectors of the records of a sealed store."""

    def __init__(self, store: LatentStore) -> None:
        """Raises StoreError if the store has no vectors of its current records."""
        result = current_result(store.storage, store.info, "statistics") if store.sealed else None
        if not isinstance(result, StoreStatistics) or result.vectors is None:
            raise StoreError(
                f"{store.url} has no pooled latents of its records: run `latentmill evaluate "
                f"{store.url} --only statistics` first."
            )
        self._store, self._entry = store, result.vectors

    def row(self, position: int) -> FloatArray:
        """The vector `[64]` of one record."""
        for start, block in self.blocks():
            if position < start + len(block):
                vector: FloatArray = block[position - start]
                return vector
        raise self._damaged()

    def blocks(self) -> Iterator[tuple[int, FloatArray]]:
        """The vectors in blocks, each with the position of its first record.

        Raises StoreError at the end if the file does not match its hash.
        """
        store, digest = self._store, xxhash.xxh3_128()
        width = 2 * Pooling.SIZE
        try:
            with store.storage.open(self._entry.file) as file:
                npy.read_magic(file)
                shape, in_columns, kind = npy.read_array_header_1_0(file)
                if shape != (len(store), Pooling.SIZE) or kind != np.float16 or in_columns:
                    raise self._damaged()
                begin = file.tell()
                file.seek(0)
                digest.update(file.read(begin))
                for start in range(0, len(store), _BLOCK):
                    data = file.read(width * min(_BLOCK, len(store) - start))
                    if len(data) != width * min(_BLOCK, len(store) - start):
                        raise self._damaged()
                    digest.update(data)
                    block = np.frombuffer(data, np.float16).reshape(-1, Pooling.SIZE)
                    yield start, block.astype(np.float32)
                if file.read(1) or digest.hexdigest() != self._entry.hash:
                    raise self._damaged()
        except ValueError as error:  # not an .npy file
            raise self._damaged() from error
        except StorageError as error:
            if isinstance(error.__cause__, FileNotFoundError):
                raise self._damaged() from error
            raise

    def _damaged(self) -> StoreError:
        url = self._store.url
        return StoreError(
            f"{url}/{self._entry.file} is missing or damaged: run `latentmill evaluate {url} "
            "--only statistics` to write it again."
        )
