"""`Loader`: batches for training, made by worker processes in memory that is used again."""

from __future__ import annotations

import math
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from typing import Any, Literal

import torch

from latentmill.errors import ConfigError
from latentmill.reader.batches import BatchSampler
from latentmill.reader.buffers import check_pinnable
from latentmill.reader.building import BatchBuilder, Collate
from latentmill.reader.collate import collate
from latentmill.reader.corpus import choice
from latentmill.reader.dataset import LatentDataset
from latentmill.reader.draws import Requested
from latentmill.reader.processes import InProcess, Workers
from latentmill.reader.sample import whole_number
from latentmill.reader.stem_dataset import StemDataset
from latentmill.reader.stream import LatentStream
from latentmill.storage.closeable import Closeable
from latentmill.text.shown import Shown

Dtype = Literal["float32", "float16"]
Source = LatentStream | LatentDataset | StemDataset[Any] | BatchSampler


class Loader(Shown, Closeable):
    """Yields the batches that a DataLoader yields, in the same order, but faster.

    Worker processes write batches into memory that they share with this process and use again, so
    no batch is copied or needs new memory. Each iteration is the next epoch of `source`.

    A batch is yours while you refer to it: its memory is used again only when none of its tensors,
    and no view or array made from them, exists any more. If you keep batches, the loader uses more
    memory. With `pin_memory`, copies to GPUs that were started on the current stream of each GPU
    may still be running when you delete the batch; if you copy on another stream, keep the batch
    until that copy has ended.

    The worker processes start with the first iteration and end with `close()`, at the end of a
    `with` block, or when the loader is deleted. A fork of this process starts its own with its next
    iteration; the batches that you held at the fork share their memory with this process.

    Args:
        source: What to read: a `LatentStream`; a `LatentDataset` or `StemDataset`, shuffled by a
            new `BatchSampler`; or a `BatchSampler` with other options.
        batch_size: Samples per batch. None uses that of the stream or batch sampler.
        workers: Number of worker processes; 0 reads in this process.
        dtype: `float32`, or `float16`, which float32 tensors of a batch are converted to.
        pin_memory: Whether batches are in page-locked memory, from which copies to a GPU are
            faster and asynchronous with `non_blocking=True`.
        collate_fn: Makes a batch of samples. With `collate` or `collate_tensors`, crops without
            transforms are read into the batch without making samples.
        drop_last: Whether to leave out the last batch if it is not full; a `BatchSampler` has its
            own option.
        prefetch: Number of batches that each worker makes ahead.
        start_method: How processes are started: `fork`, `spawn` or `forkserver`. None uses the
            default of Python's multiprocessing.

    Raises:
        ConfigError: An option is invalid.
    """

    def __init__(
        self,
        source: Source,
        batch_size: int | None = None,
        *,
        workers: int = 2,
        dtype: Dtype = "float32",
        pin_memory: bool = False,
        collate_fn: Collate = collate,
        drop_last: bool = False,
        prefetch: int = 2,
        start_method: str | None = None,
    ) -> None:
        choice("dtype", dtype, Dtype)
        self._workers = whole_number("workers", workers, least=0)
        self._prefetch = whole_number("prefetch", prefetch, least=1)
        if pin_memory:
            check_pinnable()
        self._pin, self._start_method, self._drop_last = pin_memory, start_method, drop_last
        self._order = _order(source, batch_size, drop_last=drop_last)
        assert self._order.batch_size is not None
        self.batch_size = self._order.batch_size
        read: Any = getattr(self._order, "dataset", self._order)
        read = getattr(read, "corpus", read)
        self._builder = BatchBuilder(read, collate_fn, getattr(torch, dtype))
        self._maker: Workers | InProcess | None = None
        self._stop: Callable[[], object] = int
        self._iteration = 0
        self._start: dict[str, Any] | None = None  # state at the start of the iteration
        self._last: dict[str, Any] | None = None  # epoch and positions of the last batch

    def shown(self) -> Mapping[str, object]:
        """The values that `repr` and a notebook show."""
        return {
            "source": type(self._order).__name__,
            "batch_size": self.batch_size,
            "workers": self._workers,
        }

    def __len__(self) -> int:
        """Number of batches that this rank gets in a whole epoch, also after `load_state_dict`."""
        if isinstance(self._order, BatchSampler):
            return len(self._order)
        batches = len(self._order) / self.batch_size
        return math.floor(batches) if self._drop_last else math.ceil(batches)

    batch_sampler = None  # Lightning looks for it in what has a `sampler`

    @property
    def sampler(self) -> Loader:
        """Returns itself, because Lightning calls `sampler.set_epoch` of a loader."""
        return self

    def __iter__(self) -> Iterator[Any]:
        """The batches of the next epoch, or of the rest of an epoch whose state was loaded.

        Raises:
            WorkerError: A worker process has died.
            StorageError: A shard cannot be read.
        """
        self._iteration += 1
        self._start, self._last = self._order.upcoming_state(), None
        if isinstance(self._order, BatchSampler):
            requests = self._order.requested()
        else:
            requests = self._order.requested(self.batch_size, drop_last=self._drop_last)
        return self._batches(requests, self._iteration)

    def _batches(self, requests: Iterator[Requested], iteration: int) -> Iterator[Any]:
        try:
            self._refuse_unless(self._iteration == iteration)
            maker = self._started()
            maker.skip()  # what an abandoned iteration has requested
            pending: deque[Requested] = deque()
            for requested in islice(requests, maker.capacity):
                maker.request(requested)
                pending.append(requested)
            while pending:
                received, requested = [maker.receive()], pending.popleft()
                for following in islice(requests, 1):
                    maker.request(following)
                    pending.append(following)
                positions = requested.positions.tolist()
                self._last = {"epoch": [requested.epoch] * len(positions), "position": positions}
                yield received.pop()  # without a reference to it in this frame
                self._refuse_unless(self._iteration == iteration and maker.usable)
        except GeneratorExit:  # the iterator is dropped; the workers wait for the next one
            raise
        except BaseException:  # also KeyboardInterrupt: a message may have been read in part
            if self._iteration == iteration:
                self.close()
            raise

    @staticmethod
    def _refuse_unless(current: bool) -> None:
        if not current:
            raise ConfigError(
                "this iterator cannot continue, because its Loader was closed or iterated over "
                "again, or its process was forked: use one iterator of a Loader at a time, in the "
                "process that started it."
            )

    def _started(self) -> Workers | InProcess:
        """What makes the batches; starts the worker processes if they are not running."""
        if self._maker is not None and not self._maker.usable:
            self._maker = None
            self._stop()  # forgets them
        if self._maker is None:
            if self._workers:
                self._maker = Workers(
                    self._builder,
                    self._workers,
                    prefetch=self._prefetch,
                    method=self._start_method,
                    pin=self._pin,
                )
            else:
                self._maker = InProcess(self._builder, pin=self._pin)
            self._stop = weakref.finalize(self, self._maker.stop)
        return self._maker

    def close(self) -> None:
        """End the worker processes; batches that you hold stay valid.

        A later iteration starts new ones.
        """
        self._iteration += 1
        if self._maker is not None:
            self._maker = None
            self._stop()

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of the next iteration; continues in it if a state of it was loaded."""
        self._start = self._last = None
        self._order.set_epoch(epoch)

    def state_dict(self) -> dict[str, Any]:
        """The state after the last batch that was yielded, on all ranks.

        It is the same as `state_after` of that batch. Batches that workers have made ahead do not
        count.
        """
        if self._last is not None:
            return self._order.state_after(self._last)
        return self._start or self._order.upcoming_state()

    def state_after(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """The state after all ranks have trained on their batch of this step.

        Args:
            batch: This rank's last batch.
        """
        return self._order.state_after(batch)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume from a saved state, with any number of ranks and workers.

        The state may also be that of a stream or batch sampler that was used with a DataLoader.

        Raises:
            ConfigError: The state belongs to another order of samples.
        """
        self._order.load_state_dict(state)
        self._start = self._last = None


def _order(
    source: object, batch_size: int | None, *, drop_last: bool
) -> LatentStream | BatchSampler:
    """The stream or batch sampler that determines the order of a source."""
    if batch_size is not None:
        whole_number("batch_size", batch_size, least=1)
    if isinstance(source, LatentDataset | StemDataset):
        if batch_size is None:
            raise ConfigError("Loader needs a batch_size: give it the number of samples.")
        return BatchSampler(source, batch_size, drop_last=drop_last)
    if not isinstance(source, LatentStream | BatchSampler):
        raise ConfigError(
            "Loader needs a LatentStream, LatentDataset, StemDataset or BatchSampler, not "
            f"{type(source).__name__}."
        )
    kind = type(source).__name__
    if drop_last and isinstance(source, BatchSampler) and not source.drop_last:
        raise ConfigError(
            "drop_last is True in Loader, but False in BatchSampler: give it to BatchSampler."
        )
    if isinstance(source, LatentStream) and source.batch_size is None:
        source.batch_size = batch_size
    if source.batch_size is None:
        raise ConfigError(f"batch_size is None in Loader and {kind}: give it to one of them.")
    if batch_size not in (None, source.batch_size):
        raise ConfigError(
            f"batch_size is {batch_size} in Loader, but {source.batch_size} in {kind} (its own, or "
            f"that of an earlier Loader): use the same number, or a new {kind}."
        )
    return source
