"""Memory that processes share, and batches stored in it.

The memory has no name that could be left behind: the system frees it when no process has it mapped
any more, however the processes ended.
"""

from __future__ import annotations

import copyreg
import io
import math
import os
import pickle
import tempfile
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import torch

from latentmill.errors import ConfigError

_ALIGNMENT = 64  # of tensors in the memory, in bytes


def create_memory(size: int) -> int:
    """Create shared memory of `size` bytes; returns its file descriptor."""
    if hasattr(os, "memfd_create"):  # unlike /dev/shm, it has no limit of its own in containers
        file = os.memfd_create("latentmill")
    else:
        with tempfile.TemporaryFile() as temporary:
            file = os.dup(temporary.fileno())
    try:
        os.ftruncate(file, size)
        if hasattr(os, "posix_fallocate"):  # raises OSError now instead of SIGBUS later
            os.posix_fallocate(file, 0, size)
    except OSError:
        os.close(file)
        raise
    return file


def map_memory(file: int, size: int) -> torch.Tensor:
    """Map shared memory as a uint8 tensor and close the file descriptor.

    A held batch therefore needs no open file, of which a process may have only about 1,000.
    """
    try:
        return torch.from_file(f"/dev/fd/{file}", shared=True, size=size, dtype=torch.uint8)
    finally:
        os.close(file)


class Slot:
    """Shared memory of a worker as the main process sees it; holds one batch at a time."""

    def __init__(self, number: int, worker: int) -> None:
        self.number, self.worker = number, worker
        self.memory: torch.Tensor | None = None
        self._pinned = False
        self._copied: list[torch.cuda.Event] = []

    def set_memory(self, memory: torch.Tensor, *, pin: bool) -> None:
        """Use other memory, page-locked if `pin`."""
        self.free()
        self.memory = memory
        if pin:
            runtime: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
            torch.cuda.check_error(runtime.cudaHostRegister(memory.data_ptr(), memory.numel(), 0))
            self._pinned = True

    def unpack(self, used: int, payload: tuple[int, int], released: Released) -> Any:
        """The batch in the first `used` bytes; `released` gets the slot at the end of its life.

        That is when no tensor, view or array refers to the memory any more.
        """
        assert self.memory is not None
        root = self.memory.numpy()[:used]  # a new object, which all tensors of the batch refer to
        weakref.finalize(root, released.add, self).atexit = False
        return unpack(torch.from_numpy(root), payload)

    def mark_copied(self) -> None:
        """Note that the batch is deleted; copies of it to GPUs may not have ended yet."""
        if self._pinned:
            self._copied = [_recorded(device) for device in _used_devices()]

    @property
    def reusable(self) -> bool:
        """Whether copies to GPUs that were started from this memory have ended."""
        return all(event.query() for event in self._copied)  # type: ignore[no-untyped-call]

    def free(self) -> None:
        """Give the memory back, once no batch is in it."""
        if self._pinned and self.memory is not None:
            for event in self._copied:
                event.synchronize()
            runtime: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
            runtime.cudaHostUnregister(self.memory.data_ptr())
            self._pinned = False
        self.memory, self._copied = None, []


class Released:
    """Slots whose batch is no longer referenced. Thread-safe, since any thread may delete it."""

    def __init__(self) -> None:
        self._slots: deque[Slot] = deque()
        self._closed = False
        self._pid = os.getpid()

    def add(self, slot: Slot) -> None:
        if self._pid != os.getpid():  # a fork, which neither uses nor has page-locked the memory
            return
        slot.mark_copied()
        self._slots.append(slot)
        if self._closed:
            self.close()

    def take(self) -> Iterator[Slot]:
        """Remove and yield the slots."""
        while self._slots:
            yield self._slots.popleft()

    def close(self) -> None:
        """Free the memory of these slots, and of later ones when their batches are deleted."""
        self._closed = True
        for slot in self.take():
            slot.free()


def _used_devices() -> list[int]:
    """The GPUs that this process uses. An event on another one would take memory there."""
    library: Any = torch._C  # torch has no public function for this
    devices = range(torch.cuda.device_count())
    return [device for device in devices if library._cuda_hasPrimaryContext(device)]


def _recorded(device: int) -> torch.cuda.Event:
    """An event after all that was started on the current stream of a GPU."""
    event = torch.cuda.Event()  # type: ignore[no-untyped-call]
    event.record(torch.cuda.current_stream(device))
    return event


def check_pinnable() -> None:
    """Raise ConfigError if memory cannot be page-locked."""
    if not torch.cuda.is_available():
        raise ConfigError(
            "pin_memory needs a GPU with CUDA: use pin_memory=torch.cuda.is_available()."
        )


class Packed:
    """A batch, pickled without its tensors, and where these go in a buffer.

    Args:
        batch: Any object. Its float32 tensors are stored as `dtype`. A tensor on torch's `meta`
            device has no values yet; `fill` writes them into the buffer.
        dtype: float32 or float16.
        fill: Writes the values of the tensors on the `meta` device, given the tensors in the
            buffer that replace them.
    """

    def __init__(
        self,
        batch: object,
        dtype: torch.dtype,
        fill: Callable[[list[torch.Tensor]], None] | None = None,
    ) -> None:
        self._dtype, self._fill = dtype, fill
        self._tensors: list[tuple[torch.Tensor, _Place]] = []
        self._end = 0
        data = io.BytesIO()
        pickler = pickle.Pickler(data, pickle.HIGHEST_PROTOCOL)
        pickler.dispatch_table = copyreg.dispatch_table | {torch.Tensor: self._reduce}
        pickler.dump(batch)
        self._data = data.getvalue()
        self.payload = (self._end, self._end + len(self._data))
        self.size = self.payload[1]

    def write(self, memory: torch.Tensor) -> None:
        """Write everything into uint8 memory of at least `size` bytes."""
        memory.numpy()[slice(*self.payload)] = np.frombuffer(self._data, np.uint8)
        empty = []
        for tensor, place in self._tensors:
            stored = _view(memory, *place)
            if tensor.device.type == "meta":
                empty.append(stored)
            else:
                stored.copy_(tensor)
        if self._fill is not None:
            self._fill(empty)

    def _reduce(self, tensor: torch.Tensor) -> Any:
        """What pickle stores for a tensor: its place in the buffer."""
        if tensor.layout is not torch.strided:
            return tensor.__reduce_ex__(pickle.HIGHEST_PROTOCOL)  # type: ignore[no-untyped-call]
        dtype = self._dtype if tensor.dtype is torch.float32 else tensor.dtype
        place = (self._end, dtype, tuple(tensor.shape), _dense_stride(tensor))
        size = tensor.numel() * dtype.itemsize
        self._end += -(-size // _ALIGNMENT) * _ALIGNMENT
        self._tensors.append((tensor.detach(), place))
        return _stored_tensor, place


def unpack(memory: torch.Tensor, payload: tuple[int, int]) -> Any:
    """The batch that `Packed.write` wrote into uint8 memory; its tensors are views of it."""
    return _Unpickler(memory, payload).load()


class _Unpickler(pickle.Unpickler):
    def __init__(self, memory: torch.Tensor, payload: tuple[int, int]) -> None:
        super().__init__(io.BytesIO(memory[slice(*payload)].numpy().data))
        self._root = memory

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == (__name__, _stored_tensor.__name__):
            return partial(_view, self._root)
        return super().find_class(module, name)


# Offset in bytes, dtype, shape and strides of a tensor in a buffer.
_Place = tuple[int, torch.dtype, tuple[int, ...], tuple[int, ...]]


def _stored_tensor(*place: Any) -> torch.Tensor:
    """Stands for `_view` in a pickle."""
    raise AssertionError("only _Unpickler knows the memory")


def _view(
    root: torch.Tensor,
    offset: int,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    stride: tuple[int, ...],
) -> torch.Tensor:
    size = dtype.itemsize * math.prod(shape)
    return root[offset : offset + size].view(dtype).as_strided(shape, stride)


def _dense_stride(tensor: torch.Tensor) -> tuple[int, ...]:
    """The strides of a tensor without gaps: its own, or those of C order if it has gaps."""
    axes = sorted(range(tensor.ndim), key=tensor.stride, reverse=True)
    expected = 1
    dense = True
    for axis in reversed(axes):
        dense &= tensor.shape[axis] == 1 or tensor.stride(axis) == expected
        expected *= tensor.shape[axis]
    if dense:
        return tensor.stride()
    ends = [math.prod(tensor.shape[axis + 1 :]) for axis in range(tensor.ndim)]
    return tuple(ends)
