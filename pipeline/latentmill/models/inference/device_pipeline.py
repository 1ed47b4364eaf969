"""Device pipeline: the next batches are copied to the GPU while the model computes the current one.

Batches are assembled in memory that is reused (`stage`). On a GPU it is page-locked, so that both
copies run in parallel with the computation (audio on its own stream, latents on the stream of the
computation, after it). The latents of a batch are awaited only after the next two batches are
queued. On a CPU it is a plain call.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, TypeAlias, cast

import numpy as np
import torch
from torch import Tensor

from latentmill.models.base import Autoencoder, StatefulAutoencoder
from latentmill.models.inference.device import trim_memory
from latentmill.models.inference.precision import Precision, numeric_mode
from latentmill.record import FloatArray

if TYPE_CHECKING:
    from latentmill.models.base import State

    States: TypeAlias = Sequence[State | None]

# Memory is trimmed after this many changes of the batches' shape: it stays bounded, and the time
# for trimming is negligible.
CHANGES_UNTIL_TRIM = 4

ALONE: AbstractContextManager[object] = nullcontext()  # no other model runs in this process


class Transport(Protocol):
    """Copies audio to a device and latents back."""

    prefetch: int  # batches that are queued before the first one's latents are awaited

    def stage(self, shape: tuple[int, int, int]) -> FloatArray:
        """Memory `[B, C, T]` for the audio of the next batch, to be filled before `send`.

        It is used again when the latents of this batch have been awaited.
        """
        ...

    def send(self, audio: FloatArray) -> Tensor:
        """Copy audio `[B, C, T]` to the device."""
        ...

    def fetch(self, latents: Tensor) -> Any:
        """Start to copy latents back; return a handle for `wait`."""
        ...

    def wait(self, pending: Any) -> FloatArray:
        """Wait for the latents of a `fetch`."""
        ...


class PlainTransport:
    """Transport for a model on the CPU.

    Batches of different shapes leave holes in the memory that the process keeps, so it is trimmed
    after some changes of shape. Changes are counted per process, because each unit has its own
    device pipeline.
    """

    prefetch = 0
    _shape: ClassVar[tuple[int, ...] | None] = None
    _changes: ClassVar[int] = 0
    _memory: FloatArray | None = None

    def stage(self, shape: tuple[int, int, int]) -> FloatArray:
        size = math.prod(shape)
        if self._memory is None or self._memory.size < size:
            self._memory = np.empty(size, np.float32)
        return self._memory[:size].reshape(shape)

    def send(self, audio: FloatArray) -> Tensor:
        if PlainTransport._shape not in (None, audio.shape):
            PlainTransport._changes += 1
            if PlainTransport._changes % CHANGES_UNTIL_TRIM == 0:
                trim_memory()
        PlainTransport._shape = audio.shape
        return torch.from_numpy(audio)

    def fetch(self, latents: Tensor) -> Tensor:
        return latents

    def wait(self, pending: Tensor) -> FloatArray:
        latents: FloatArray = pending.float().cpu().numpy()
        if self._memory is not None and np.may_share_memory(latents, self._memory):
            latents = latents.copy()  # a model may return a part of its input
        return latents


class CudaTransport:
    """Transport for a model on a GPU; see the module's docstring.

    Page-locked memory and device memory come from PyTorch's caching allocators, which do not reuse
    a block until the streams that use it are done with it.
    """

    prefetch = 2

    def __init__(self, device: str) -> None:
        self._device = torch.device(device)
        # The latents of the batch that used a slot before have been awaited when it is used again.
        self._slots = deque(torch.empty(0, device="cpu") for _ in range(self.prefetch + 1))
        self._copies = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]

    def stage(self, shape: tuple[int, int, int]) -> FloatArray:
        """A page-locked slot of a ring."""
        size = math.prod(shape)
        slot = self._slots.popleft()
        if slot.numel() < size:
            slot = torch.empty(size, dtype=torch.float32, device="cpu", pin_memory=True)
        self._slots.append(slot)
        memory: FloatArray = slot.numpy()[:size].reshape(shape)
        return memory

    def send(self, audio: FloatArray) -> Tensor:
        """Copy on the copy stream; the computation waits for the copy, this thread does not."""
        pinned = torch.from_numpy(audio)
        if not pinned.is_pinned():  # it was not staged
            pinned = pinned.pin_memory()
        computing = torch.cuda.current_stream(self._device)
        with torch.cuda.stream(self._copies):
            on_device = pinned.to(self._device, non_blocking=True)
        computing.wait_stream(self._copies)
        on_device.record_stream(computing)
        return on_device

    def fetch(self, latents: Tensor) -> tuple[Tensor, torch.cuda.Event]:
        """Copy after the computation; the event marks the end of the copy."""
        on_host = torch.empty(latents.shape, dtype=torch.float32, device="cpu", pin_memory=True)
        on_host.copy_(latents, non_blocking=True)
        done = torch.cuda.Event()  # type: ignore[no-untyped-call]
        done.record(torch.cuda.current_stream(self._device))
        return on_host, done

    def wait(self, pending: tuple[Tensor, torch.cuda.Event]) -> FloatArray:
        """Wait for the event. The latents are copied, because page-locked memory is scarce."""
        on_host, done = pending
        done.synchronize()
        latents: FloatArray = on_host.numpy().copy()
        return latents


class DevicePipeline:
    """Encodes batches in order, in a numeric mode; the default transport depends on the device.

    If models run in several threads, they share `step`: each holds it while it encodes, because
    the numeric mode is global to the process, and so that they do not compete for its cores.
    """

    def __init__(
        self,
        model: Autoencoder,
        device: str = "cpu",
        precision: Precision = "float32",
        transport: Transport | None = None,
        step: AbstractContextManager[object] = ALONE,
    ) -> None:
        self._model = model
        self._step = step
        self._device = device
        self._precision = precision
        on_gpu = device.startswith("cuda")
        self._transport = transport or (CudaTransport(device) if on_gpu else PlainTransport())
        self._pending: deque[Any] = deque()
        self._halved = False  # the device has run out of memory

    def stage(self, shape: tuple[int, int, int]) -> FloatArray:
        """Memory for the next batch `[B, C, T]`: fill it, then `push` it."""
        return self._transport.stage(shape)

    def push(self, audio: FloatArray) -> Iterator[FloatArray]:
        """Queue a batch `[B, C, T]` and yield latents `[B, D, Z]` that are done, in order.

        If the device runs out of memory, this batch and all later ones are encoded in two halves.
        If half a batch does not fit either, `torch.OutOfMemoryError` is raised.
        """
        self._queue(audio, None)
        yield from self.finished()

    def step(self, audio: FloatArray, states: States) -> list[State]:
        """Queue the next chunks of several items; return their states after these chunks.

        See `StatefulAutoencoder` and `push`; `finished` yields the latents.
        """
        return self._queue(audio, states)

    def finished(self) -> Iterator[FloatArray]:
        """Yield latents `[B, D, Z]` that are done, in order."""
        while len(self._pending) > self._transport.prefetch:
            yield self._transport.wait(self._pending.popleft())

    def _queue(self, audio: FloatArray, states: States | None) -> list[State]:
        sent = self._transport.send(audio)
        encoded = self._encode(sent, states)
        if encoded is None:
            torch.cuda.empty_cache()  # after the handler, whose traceback references activations
            encoded = self._encode(sent, states)
            assert encoded is not None, "it raises the second time"
        latents, after = encoded
        self._pending.append(self._transport.fetch(latents))
        return after

    def _encode(self, sent: Tensor, states: States | None) -> tuple[Tensor, list[State]] | None:
        """Return the latents and new states, or None the first time that memory runs out."""
        size = -(-len(sent) // 2) if self._halved else len(sent)
        latents: list[Tensor] = []
        after: list[State] = []
        with self._step, numeric_mode(self._precision, self._device):
            try:
                for start in range(0, len(sent), size):
                    part = slice(start, start + size)
                    if states is None:
                        latents.append(self._model.encode(sent[part]))
                    else:
                        model = cast(StatefulAutoencoder, self._model)
                        encoded, new = model.encode_step(sent[part], states[part])
                        latents.append(encoded)
                        after += new
            except torch.OutOfMemoryError:
                if self._halved or len(sent) == 1:
                    raise
                self._halved = True
                return None
        return latents[0] if len(latents) == 1 else torch.cat(latents), after

    def flush(self) -> Iterator[FloatArray]:
        """Yield the latents of all batches that are still queued."""
        while self._pending:
            yield self._transport.wait(self._pending.popleft())
