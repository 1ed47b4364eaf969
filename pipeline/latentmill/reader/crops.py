"""Crops of many items in one batched read, padded with silence after the end of an item."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
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
VIEWED_BYTES = 1 << 17  # local crops from this size are converted from the mapped file
_Range = tuple[Shard, int, int]  # shard, offset, length in bytes


@dataclass(frozen=True)
class Crop:
    """A request for `frames` frames of the item at `row`, from frame `start` on.

    Attributes:
        row: The item's position in the store's sorted keys; see `CropReader.row`.
        start: The first frame, inside the item.
        frames: Number of frames; frames after the end of the item are silence.
    """

    row: int
    start: int
    frames: int


@dataclass(frozen=True)
class Cropped:
    """A crop that was read.

    Attributes:
        latent: `[channels, frames]`, float32; in memory frame after frame, as on disk.
        mask: `[frames]`, True for frames of the item, False for silence.
    """

    latent: FloatArray = field(repr=False)
    mask: npt.NDArray[np.bool_] = field(repr=False)


class CropReader(RowReader):
    """Reads crops of a store's latents: only their bytes, and all crops of a call in one batch.

    Small when pickled. Opens files when they are needed, and again after a fork. Not thread-safe.
    """

    def __init__(self, store: LatentStore, cache: RangeCache | None = None) -> None:
        check_croppable(store)
        self._shards = ShardReader(store.storage, cache)
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

    def read(self, crops: Sequence[Crop]) -> list[Cropped]:
        """Read crops of any lengths in one batch.

        Raises:
            IndexError: A row does not exist, or a crop starts outside its item.
            StorageError: A shard cannot be read, or its size is not the one in its commit.
        """
        return list(self.each(crops))

    def each(self, crops: Sequence[Crop]) -> Iterator[Cropped]:
        """Like `read`, but an iterator: long local crops are read when it reaches them."""
        rows = np.array([crop.row for crop in crops], np.int64)
        starts = np.array([crop.start for crop in crops], np.int64)
        frames = np.array([crop.frames for crop in crops], np.int64)
        have = self._lengths(rows, starts, frames)
        lengths = have.tolist()
        raws: Iterable[Raw]
        if self.store.storage.local and sum(lengths) * self._width >= len(crops) * VIEWED_BYTES:
            raws = (self._view(*crop) for crop in zip(rows, starts, have, strict=True))
        else:
            raws = buffers = [np.empty((length, self.channels), self._dtype) for length in lengths]
            self._fill(rows, starts, have, buffers)
        return map(self._cropped, crops, raws)

    def _view(self, row: np.int64, start: np.int64, have: np.int64) -> Raw:
        """A long crop in the stored dtype, `[frames, channels]`, mapped but not read yet."""
        crop = np.array([row]), np.array([start]), np.array([have])
        data = self._with_current_index(lambda: self._shards.view(*self._ranges(*crop)[0]))
        return np.frombuffer(data, self._dtype).reshape(-1, self.channels)

    def _cropped(self, crop: Crop, raw: Raw) -> Cropped:
        """Convert and pad the stored frames `[frames, channels]` of a crop."""
        if len(raw) == crop.frames:
            return Cropped(_to_float(raw).T, np.ones(crop.frames, np.bool_))
        mask = np.arange(crop.frames) < len(raw)
        block = np.empty((crop.frames, self.channels), np.float32)
        block[: len(raw)] = _to_float(raw)
        self._pad(block, crop.start, len(raw))
        return Cropped(block.T, mask)

    def read_block(self, rows: Ints, starts: Ints, frames: int) -> tuple[FloatArray, Ints]:
        """Read crops of one length.

        Returns:
            `[crops, frames, channels]`, float32, and the number of frames before padding of each.

        Raises:
            IndexError, StorageError: As for `read`.
        """
        have = self._lengths(rows, starts, np.int64(frames))
        raw = self._buffer(len(rows) * frames * self.channels)
        raw = raw.reshape(len(rows), frames, self.channels)
        self._fill(rows, starts, have, list(raw))
        block = _to_float(raw)
        for number in np.flatnonzero(have < frames).tolist():
            self._pad(block[number], int(starts[number]), int(have[number]))
        return block, have

    def _buffer(self, size: int) -> Raw:
        """A reused buffer in the stored dtype: allocating new pages costs more than reading."""
        if len(self._raw) < size:
            self._raw = np.empty(size, self._dtype)
        return self._raw[:size]

    def _lengths(self, rows: Ints, starts: Ints, frames: Ints | np.int64) -> Ints:
        if len(rows) and not (rows.min() >= 0 and rows.max() < len(self.frames)):
            raise IndexError(f"row out of range: use 0 to {len(self.frames) - 1}")
        left = self.frames[rows] - starts
        if len(rows) and (starts.min() < 0 or left.min() <= 0):
            raise IndexError("a crop must start inside its item")
        lengths: Ints = np.minimum(left, frames)
        return lengths

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

    def _pad(self, block: FloatArray, start: int, have: int) -> None:
        """Fill a crop `[frames, channels]` with silence after its first `have` frames."""
        missing = len(block) - have
        if missing:
            end = start + len(block)
            block[have:] = self.store.origin.crop(end, start + have, missing).T


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
