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
from latentmill.store.measurement import EVALUATION, current_result
from latentmill.store.metadata import publish
from latentmill.store.npy import read_npy_header
from latentmill.store.results import VECTORS_FILE, PooledVectors, StoreStatistics
from latentmill.store.store import LatentStore

_BLOCK = 1 << 16  # rows that are in memory: 16 MiB on disk

npy: Any = np.lib.format  # without type hints
Half = npt.NDArray[np.float16]


def write_vectors(storage: Storage, positions: Half, shapes: Half) -> PooledVectors:
    """Write the vectors of all records, from those of `Pooling`; listed in statistics.json."""
    sounding = positions.any(axis=1)
    total = shapes.sum(axis=0, dtype=np.float64, where=sounding[:, None])
    mean = (total / max(1, int(sounding.sum()))).astype(np.float32)  # zeros if all are silent
    with storage.scratch_file("vectors.npy") as file:
        with writing(str(file)), file.open("wb") as out:
            shape = (len(positions), Pooling.SIZE + len(mean))
            kind = {"descr": "<f2", "fortran_order": False, "shape": shape}
            npy.write_array_header_1_0(out, kind)
            for start in range(0, len(positions), _BLOCK):
                part = slice(start, start + _BLOCK)
                block = combined(positions[part], shapes[part], mean)
                out.write(block.astype("<f2").tobytes())
        path, digest = publish(storage, file, f"{EVALUATION}/vectors", "npy")
    return PooledVectors(file=path, hash=digest, mean=mean.tolist())


def combined(positions: npt.NDArray[Any], shapes: npt.NDArray[Any], mean: FloatArray) -> FloatArray:
    """Unit vectors whose product is the mean of two cosines; zeros for silent records.

    One cosine is that of the positions, which compares the course in time. The other is that of
    the shapes without the mean shape, which compares the spectrum.
    """
    vectors = np.concatenate([positions, shapes - mean], axis=1, dtype=np.float32)
    for columns in (slice(0, Pooling.SIZE), slice(Pooling.SIZE, None)):
        norms = np.linalg.norm(vectors[:, columns], axis=1, keepdims=True)
        vectors[:, columns] /= np.sqrt(2) * np.maximum(norms, 1e-30)
    vectors[~positions.any(axis=1)] = 0
    return vectors


def remove_other_vectors(storage: Storage, vectors: PooledVectors) -> None:
    """Remove the vectors of earlier results."""
    for name in storage.list(EVALUATION):
        path = f"{EVALUATION}/{name}"
        if re.fullmatch(VECTORS_FILE, path) and path != vectors.file:
            storage.delete(path)


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
        self._mean = np.array(result.vectors.mean, np.float32)

    def of_latent(self, latent: Latent) -> FloatArray:
        """The vector of a latent in the format of the store."""
        stacked = latent.ndim == 3
        parts = [chunk[:, : used_frames(chunk)] for chunk in latent] if stacked else [latent]
        frames = torch.from_numpy(np.concatenate(parts, axis=1).T.astype(np.float32))  # [F, D]
        pooling = ShardPass(self._store).pooling
        positions, shapes = pooling(frames, np.array([len(frames)]))
        if shapes.shape[1] != len(self._entry.mean):
            raise self._damaged()
        vector: FloatArray = combined(positions, shapes, self._mean)[0]
        return vector

    def row(self, position: int) -> FloatArray:
        """The vector of one record."""
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
        columns = Pooling.SIZE + len(self._mean)
        width = 2 * columns
        try:
            with store.storage.open(self._entry.file) as file:
                shape, in_columns, kind = read_npy_header(file)
                if shape != (len(store), columns) or kind != np.float16 or in_columns:
                    raise self._damaged()
                begin = file.tell()
                file.seek(0)
                digest.update(file.read(begin))
                for start in range(0, len(store), _BLOCK):
                    data = file.read(width * min(_BLOCK, len(store) - start))
                    if len(data) != width * min(_BLOCK, len(store) - start):
                        raise self._damaged()
                    digest.update(data)
                    block = np.frombuffer(data, np.float16).reshape(-1, columns)
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
