"""Crops of many items in one batched read, padded with silence after the end of an item."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from latentmill.errors import ConfigError, StoreError
from latentmill.reader.cache import Piece, RangeCache, Shard
from latentmill.reader.order import Ints
from latentmill.reader.rows import RowReader
from latentmill.reader.shards import ShardReader
from latentmill.record import DTYPES, FloatArray
from latentmill.store.index import Index
from latentmill.store.schema import DATASET_PATH
from latentmill.store.store import LatentStore

Raw = npt.NDArray[Any]  # in the stored dtype
VIEWED_BYTES = 1 << 17  # local latents of this average size are converted from the mapped file
_Range = tuple[Shard, int, int]  # shard, offset, length in bytes


class CropReader(RowReader):
    """Reads crops of a store's latents: only their bytes, and all crops of a call in one batch.

    Small when pickled. Opens files when they are needed, and again after a fork. Not thread-safe.
    """

    def __init__(self, store: LatentStore, cache: RangeCache | None = None) -> None:
        check_croppable(store)
        self._cache = cache
        super().__init__(store, cache)
        index = self._index
        self.frames: Ints = index.column("frames")
        self.num_samples: Ints = index.column("num_samples")
        self._dtype = DTYPES[store.info.dtype]
        self._raw = np.empty(0, self._dtype)
        self.channels = int(index.column("channels")[0]) if len(index) else 0
        self._width = self.channels * self._dtype.itemsize  # bytes of a frame

    def _use_index(self, index: Index) -> None:
        super()._use_index(index)
        self._shards = ShardReader(self.store.storage, self._cache)
        self._offsets = index.column("offset")
        self._shard_of = index.column("shard")
        sizes = self.store.shard_sizes()
        if strange := sorted(set(index.shards) - set(sizes)):
            raise StoreError(
                f"{self.store.url}: the index names a shard that {DATASET_PATH} does not, "
                f"{strange[0]}: run the same encode command again to write them again."
            )
        self._paths = [Shard(path, *sizes[path]) for path in index.shards]

    def physical_order(self) -> Ints:
        """The rows in their order in the shards."""
        order: Ints = np.lexsort((self._offsets, self._shard_of)).astype(np.int64)
        return order

    def read_whole(self, rows: Ints) -> Iterator[FloatArray]:
        """Read whole latents, `[channels, frames]`, in one batch; see `read_block` for errors.

        Long local latents are read when the iterator reaches them.
        """
        starts, frames = np.zeros_like(rows), self.frames[rows].astype(np.int64)
        raws: Iterable[Raw]
        if self.store.storage.local and frames.sum() * self._width >= len(rows) * VIEWED_BYTES:
            raws = map(self._view, rows)
        else:
            raws = buffers = [np.empty((length, self.channels), self._dtype) for length in frames]
            self._fill(rows, starts, frames, buffers)
        return (_to_float(raw).T for raw in raws)

    def _view(self, row: np.int64) -> Raw:
        """A whole latent in the stored dtype, `[frames, channels]`, mapped but not read yet."""
        whole = np.array([row]), np.zeros(1, np.int64), self.frames[[row]].astype(np.int64)
        data = self._with_current_index(lambda: self._shards.view(*self._ranges(*whole)[0]))
        return np.frombuffer(data, self._dtype).reshape(-1, self.channels)

    def read_block(self, rows: Ints, starts: Ints, frames: int) -> tuple[FloatArray, Ints]:
        """Read crops of one length in one batch; frames after the end of an item are silence.

        Args:
            rows: Positions of the items in the store's sorted keys; see `row`.
            starts: The first frame of each crop, inside the item.
            frames: Number of frames of each crop.

        Returns:
            `[crops, frames, channels]`, float32, and the number of frames before padding of each.

        Raises:
            IndexError: A row does not exist, or a crop starts outside its item.
            StorageError: A shard cannot be read, or its size is not the one in its commit.
        """
        block = torch.empty(len(rows), frames, self.channels)
        have = self.read_into(rows, starts, block)
        return block.numpy(), have

    def read_into(self, rows: Ints, starts: Ints, block: torch.Tensor) -> Ints:
        """Like `read_block`, but into a contiguous tensor, float32 or float16."""
        if len(rows) and not (rows.min() >= 0 and rows.max() < len(self.frames)):
            raise IndexError(f"row out of range: use 0 to {len(self.frames) - 1}")
        left = self.frames[rows] - starts
        if len(rows) and (starts.min() < 0 or left.min() <= 0):
            raise IndexError("a crop must start inside its item")
        frames = block.shape[1]
        have: Ints = np.minimum(left, frames)
        target: Raw = block.numpy()
        if target.dtype == self._dtype:
            self._fill(rows, starts, have, list(target))
        else:
            if len(self._raw) < block.numel():  # reused: new pages cost more than reading
                self._raw = np.empty(block.numel(), self._dtype)
            raw = self._raw[: block.numel()].reshape(target.shape)
            self._fill(rows, starts, have, list(raw))
            block.copy_(torch.from_numpy(raw))
        for number in np.flatnonzero(have < frames).tolist():
            end, there = int(starts[number]) + frames, int(have[number])
            silence = self.store.origin.crop(end, end - frames + there, frames - there)
            target[number, there:] = silence.T
        return have

    def _ranges(self, rows: Ints, starts: Ints, have: Ints) -> list[_Range]:
        """Shard, offset and length in bytes of the first `have` frames of each crop."""
        offsets = (self._offsets[rows] + starts * self._width).tolist()
        lengths = (have * self._width).tolist()
        shards = [self._paths[shard] for shard in self._shard_of[rows].tolist()]
        return list(zip(shards, offsets, lengths, strict=True))

    def _fill(self, rows: Ints, starts: Ints, have: Ints, raws: list[Raw]) -> None:
        """Read crops into the first `have` frames of `[frames, channels]` buffers."""

        def fill() -> None:
            ranges = self._ranges(rows, starts, have)
            self._shards.fill(
                [
                    Piece(shard, offset, raw.data.cast("B")[:length])
                    for (shard, offset, length), raw in zip(ranges, raws, strict=True)
                ]
            )

        self._with_current_index(fill)


def _to_float(raw: Raw) -> FloatArray:
    # numpy converts half floats one by one, which is 20 times slower.
    converted: FloatArray = torch.from_numpy(raw).to(torch.float32, copy=True).numpy()
    return converted


def check_croppable(store: LatentStore) -> None:
    """Raise ConfigError if a store holds overlapping chunks (`stitch: none`) or codes."""
    if store.info.layout == "chunks":
        raise ConfigError(
            f"{store.url} holds overlapping chunks (stitch none), which cannot be cropped: encode "
            "with --stitch trim or --stitch crossfade."
        )
    if store.codes:
        raise ConfigError(
            f"{store.url} holds codes, which the training reader cannot crop, pad or mix: encode "
            "without --model-option output=codes, or read whole records with store[key]."
        )
