"""Crops of many items in one batched read, padded with silence after the end of an item."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from latentmill.errors import ConfigError, StoreError
from latentmill.reader.cache import Piece, RangeCache, Shard
from latentmill.reader.order import Ints
from latentmill.reader.rows import RowReader, with_current_index
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
        self.check(store)
        self._cache, self._dtype = cache, DTYPES[store.info.dtype]
        super().__init__(store, cache)
        index = self._index
        self.frames: Ints = index.column("frames")
        self.num_samples: Ints = index.column("num_samples")
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
        self._paths = [Shard(self.placed(path), *sizes[path]) for path in index.shards]

    def _reset(self) -> None:
        self._shards = ShardReader(self.store.storage, self._cache)
        self._raw = np.empty(0, self._dtype)

    def check(self, store: LatentStore) -> None:
        """Raise ConfigError if the store's records cannot be cropped."""
        check_croppable(store)

    def placed(self, path: str) -> str:
        """A shard's path in the storage that is read from."""
        return path

    def physical_order(self) -> Ints:
        """The rows in their order in the shards."""
        order: Ints = np.lexsort((self._offsets, self._shard_of)).astype(np.int64)
        return order

    def read_whole(self, rows: Ints, also: Sequence[CropRequest] = ()) -> Iterator[FloatArray]:
        """Read whole latents, `[channels, frames]`, in one batch; see `read_block` for errors.

        Long local latents are read when the iterator reaches them. `also` are crops of the store's
        fields, which are read with the latents.
        """
        frames = self.frames[rows].astype(np.int64)
        if self.store.storage.local and frames.sum() * self._width >= len(rows) * VIEWED_BYTES:
            self.read_requests(also)
            index, ranges = self._index, self._ranges(rows, np.zeros_like(rows), frames)
            pairs = zip(rows, ranges, strict=True)
            return (_to_float(self._view(row, one, index)).T for row, one in pairs)
        buffers = [np.empty((length, self.channels), self._dtype) for length in frames]
        targets = [one for buffer in buffers for one in _bytes_of(buffer[None])]
        self.read_requests([CropRequest(self, rows, np.zeros_like(rows), frames, targets), *also])
        return (_to_float(raw).T for raw in buffers)

    def _view(self, row: np.int64, known: _Range, index: Index) -> Raw:
        """A whole latent in the stored dtype, `[frames, channels]`, mapped but not read yet.

        `known` is its range in the shards of `index`, which may no longer be the current one.
        """

        def view() -> memoryview:
            if self._index is index:
                return self._shards.view(*known)
            frames = self.frames[[row]].astype(np.int64)
            return self._shards.view(
                *self._ranges(np.array([row]), np.zeros(1, np.int64), frames)[0]
            )

        data = self._with_current_index(view)
        return np.frombuffer(data, self._dtype).reshape(-1, self.channels)

    def read_block(
        self, rows: Ints, starts: Ints, frames: int, also: Sequence[CropRequest] = ()
    ) -> tuple[FloatArray, Ints]:
        """Read crops of one length in one batch; frames after the end of an item are silence.

        Args:
            rows: Positions of the items in the store's sorted keys; see `row`.
            starts: The first frame of each crop, inside the item.
            frames: Number of frames of each crop.
            also: Crops of the store's fields, which are read in the same batch.

        Returns:
            `[crops, frames, channels]`, float32, and the number of frames before padding of each.

        Raises:
            IndexError: A row does not exist, or a crop starts outside its item.
            StorageError: A shard cannot be read, or its size is not the one in its commit.
        """
        shape = len(rows), frames, self.channels
        block = torch.empty(shape, dtype=torch.float32, device="cpu")
        have = self.read_into(rows, starts, block, also)
        return block.numpy(), have

    def read_into(
        self, rows: Ints, starts: Ints, block: torch.Tensor, also: Sequence[CropRequest] = ()
    ) -> Ints:
        """Like `read_block`, but into a contiguous tensor, float32 or float16."""
        request = self._request(rows, starts, block)
        self.read_requests([request, *also])
        return request.have

    def _request(self, rows: Ints, starts: Ints, block: torch.Tensor) -> CropRequest:
        """Crops for `read_requests`, into a contiguous tensor `[crops, frames, channels]`.

        Raises IndexError as `read_block` does.
        """
        if len(rows) and not (rows.min() >= 0 and rows.max() < len(self.frames)):
            raise IndexError(f"row out of range: use 0 to {len(self.frames) - 1}")
        left = self.frames[rows] - starts
        if len(rows) and (starts.min() < 0 or left.min() <= 0):
            raise IndexError("a crop must start inside its item")
        return self.request_of(rows, starts, np.minimum(left, block.shape[1]), block)

    def request_of(self, rows: Ints, starts: Ints, have: Ints, block: torch.Tensor) -> CropRequest:
        """Crops for `read_requests`: the first `have` frames of crops that are known to exist."""
        target: Raw = block.numpy()
        if target.dtype == self._dtype:
            return CropRequest(self, rows, starts, have, _bytes_of(target), block)
        if len(self._raw) < block.numel():  # reused: new pages cost more than reading
            self._raw = np.empty(block.numel(), self._dtype)
        raw = self._raw[: block.numel()].reshape(target.shape)
        return CropRequest(self, rows, starts, have, _bytes_of(raw), block, raw)

    def read_requests(self, requests: Sequence[CropRequest]) -> None:
        """Read crops of this reader and of the readers of its store's fields, in one batch."""

        def fill() -> None:
            self._shards.fill([piece for request in requests for piece in request.pieces()])

        with_current_index([self, *(request.reader for request in requests)], fill)
        for request in requests:
            request.finish()

    def pad(self, target: Raw, starts: Ints, have: Ints) -> None:
        """Write silence after the first `have` frames of crops, `[crops, frames, channels]`."""
        frames = target.shape[1]
        for number in np.flatnonzero(have < frames).tolist():
            end, there = int(starts[number]) + frames, int(have[number])
            silence = self.store.origin.crop(end, end - frames + there, frames - there)
            target[number, there:] = silence.T

    def pieces(
        self, rows: Ints, starts: Ints, have: Ints, targets: list[memoryview]
    ) -> list[Piece]:
        """The ranges of the first `have` frames of crops, and the memory that they go to."""
        ranges = self._ranges(rows, starts, have)
        return [
            Piece(shard, offset, target[:length])
            for (shard, offset, length), target in zip(ranges, targets, strict=True)
        ]

    def _ranges(self, rows: Ints, starts: Ints, have: Ints) -> list[_Range]:
        """Shard, offset and length in bytes of the first `have` frames of each crop."""
        offsets = (self._offsets[rows] + starts * self._width).tolist()
        lengths = (have * self._width).tolist()
        shards = [self._paths[shard] for shard in self._shard_of[rows].tolist()]
        return list(zip(shards, offsets, lengths, strict=True))


@dataclass(frozen=True)
class CropRequest:
    """Crops of one reader that `CropReader.read_requests` reads.

    Attributes:
        reader: Their reader.
        rows: Rows of the crops.
        starts: First frame of each crop.
        have: Number of frames of each crop that the item has.
        targets: Memory for the bytes of each crop, as they are stored.
        block: Where the crops are wanted, `[crops, frames, channels]`; None if that is `targets`.
        raw: The crops in `targets`, if the block has another dtype.
    """

    reader: CropReader
    rows: Ints
    starts: Ints
    have: Ints
    targets: list[memoryview]
    block: torch.Tensor | None = None
    raw: Raw | None = None

    def pieces(self) -> list[Piece]:
        """The ranges to read."""
        return self.reader.pieces(self.rows, self.starts, self.have, self.targets)

    def finish(self) -> None:
        """Convert and pad the crops that were read."""
        if self.block is None:
            return
        if self.raw is not None:
            self.block.copy_(torch.from_numpy(self.raw))
        self.reader.pad(self.block.numpy(), self.starts, self.have)


def _bytes_of(block: Raw) -> list[memoryview]:
    """The bytes of each crop of a contiguous block."""
    data, size = block.reshape(-1).view(np.uint8).data, block[:1].nbytes
    return [data[number * size : (number + 1) * size] for number in range(len(block))]


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
