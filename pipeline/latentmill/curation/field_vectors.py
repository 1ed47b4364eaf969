"""The vectors of a field, for finding the nearest records."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from latentmill.errors import ConfigError, StorageError
from latentmill.record import FloatArray
from latentmill.store.store import LatentStore

Numbers = npt.NDArray[np.int64]

_SPAN = 32 << 20  # bytes of a shard that are read at once


class FieldVectors:
    """The vectors of a field's records, of length 1; of several windows, their mean."""

    def __init__(self, store: LatentStore, name: str) -> None:
        """Raises ConfigError if the values of the field are not vectors."""
        self.store = store.field(name)
        entry = self.store.info.field
        if entry is None or entry.kind != "vector":
            kind = "latents" if entry is None else entry.kind
            raise ConfigError(
                f"field {name} of {store.url} has {kind}, not vectors: use a field of kind vector, "
                f"such as that of `latentmill add {store.url} --field clap --model clap:REPO`."
            )

    def row(self, position: int) -> FloatArray:
        """The vector of one record."""
        latent = self.store.read(self.store.index.entry(position)).latent
        vector: FloatArray = _of_length_one(latent.astype(np.float32).mean(1)[None])[0]
        return vector

    def blocks(self) -> Iterator[tuple[Numbers, FloatArray]]:
        """Positions of records and their vectors, in the order of the shards."""
        index = self.store.index
        order, ends = index.by_shard()
        offsets, lengths = index.column("offset"), index.column("length")
        for number, shard in enumerate(index.shards):
            rows = order[ends[number] : ends[number + 1]]
            rows = rows[np.argsort(offsets[rows], kind="stable")]
            while len(rows):
                first = int(offsets[rows[0]])
                inside = offsets[rows] + lengths[rows] <= first + _SPAN
                inside[0] = True  # offsets grow, so those inside are the first ones
                some, rows = rows[inside], rows[~inside]
                size = int(offsets[some[-1]] + lengths[some[-1]]) - first
                data = self.store.storage.read_range(shard, first, size)
                yield some, self._vectors(shard, data, offsets[some] - first, lengths[some])

    def _vectors(
        self,
        shard: str,
        data: bytes,
        offsets: npt.NDArray[np.int64],
        lengths: npt.NDArray[np.int64],
    ) -> FloatArray:
        dimensions, dtype = len(self.store.info.mean), np.dtype(self.store.info.dtype)
        width = dimensions * dtype.itemsize
        if len(data) < int(offsets[-1] + lengths[-1]) or (lengths % width).any():
            raise StorageError(
                f"{self.store.storage.named(shard)} is damaged or truncated: run `latentmill "
                f"verify {self.store.url}`."
            )
        found = np.empty((len(offsets), dimensions), np.float32)
        places = zip(offsets.tolist(), lengths.tolist(), strict=True)
        for number, (offset, length) in enumerate(places):
            stored = np.frombuffer(data, dtype, length // dtype.itemsize, offset)
            found[number] = stored.reshape(-1, dimensions).mean(0, dtype=np.float32)
        return _of_length_one(found)


def _of_length_one(vectors: FloatArray) -> FloatArray:
    """The vectors, scaled; those of zeros stay."""
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    scaled: FloatArray = vectors / np.where(norms > 0, norms, 1)
    return scaled
