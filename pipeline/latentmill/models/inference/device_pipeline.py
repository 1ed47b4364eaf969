"""Feeding a model: the next batch is on its way to the GPU while it works on the one before.

On a GPU a batch goes through page-locked memory, so that both copies run beside the computation
(audio on a stream of its own, latents behind the computation that makes them), and its latents
are awaited only once the next batch is queued: the loop waits once a batch, for a result that is
a batch old. On a CPU all of this is a plain call.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from latentmill.models.base import Autoencoder
from latentmill.models.inference.device import trim_memory
from latentmill.models.inference.precision import Precision, numeric_mode
from latentmill.record import FloatArray

# Other shapes in a row of batches: often enough to bound the memory, rare enough to cost nothing.
CHANGES_UNTIL_TRIM = 4


class Transport(Protocol):
    """How batches reach a model and come back."""

    ahead: int  # batches that are queued before the first one's latents are awaited

    def send(self, audio: FloatArray) -> Tensor:
        """Bring audio `[B, C, T]` to the device."""
        ...

    def fetch(self, latents: Tensor) -> Any:
        """Begin to bring latents back; gives a ticket."""
        ...

    def wait(self, ticket: Any) -> FloatArray:
        """Wait until a ticket's latents are here."""
        ...


class PlainTransport:
    """For a model on the CPU.

    Batches of different shapes leave holes in the memory that the process keeps: after some of
    them it is given back. They are counted for the process: each unit has a feed of its own.
    """

    ahead = 0
    _shape: ClassVar[tuple[int, ...] | None] = None
    _changes: ClassVar[int] = 0

    def send(self, audio: FloatArray) -> Tensor:
        """The same memory."""
        if PlainTransport._shape not in (None, audio.shape):
            PlainTransport._changes += 1
            if PlainTransport._changes % CHANGES_UNTIL_TRIM == 0:
                trim_memory()
        PlainTransport._shape = audio.shape
        return torch.from_numpy(audio)

    def fetch(self, latents: Tensor) -> Tensor:
        """The latents themselves."""
        return latents

    def wait(self, ticket: Tensor) -> FloatArray:
        """The same memory."""
        latents: FloatArray = ticket.float().cpu().numpy()
        return latents


class CudaTransport:
    """For a model on a GPU; see the module's text.

    Page-locked memory and device memory come from PyTorch's caching allocators, which do not
    give a block away again before the streams that use it are through with it.
    """

    ahead = 1

    def __init__(self, device: str) -> None:
        self._device = torch.device(device)
        self._copies = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]

    def send(self, audio: FloatArray) -> Tensor:
        """Copy on the stream of copies; the computation waits for it, this thread does not."""
        pinned = torch.from_numpy(audio).pin_memory()
        computing = torch.cuda.current_stream(self._device)
        with torch.cuda.stream(self._copies):
            there = pinned.to(self._device, non_blocking=True)
        computing.wait_stream(self._copies)
        there.record_stream(computing)
        return there

    def fetch(self, latents: Tensor) -> tuple[Tensor, torch.cuda.Event]:
        """Copy behind the computation; the event marks the end of the copy."""
        here = torch.empty(latents.shape, dtype=torch.float32, pin_memory=True)
        here.copy_(latents, non_blocking=True)
        done = torch.cuda.Event()  # type: ignore[no-untyped-call]
        done.record(torch.cuda.current_stream(self._device))
        return here, done

    def wait(self, ticket: tuple[Tensor, torch.cuda.Event]) -> FloatArray:
        """Wait for the event. The latents are copied, since page-locked memory is scarce."""
        here, done = ticket
        done.synchronize()
        latents: FloatArray = here.numpy().copy()
        return latents


def transport_to(device: str) -> Transport:
    """The transport to a device, `cpu`, `cuda` or `cuda:N`."""
    return CudaTransport(device) if device.startswith("cuda") else PlainTransport()


class DevicePipeline:
    """Sends batches through a model in a numeric mode; latents come back in the same order.

    Args:
        model: The model.
        device: Where it is.
        precision: The numeric mode.
        transport: How to reach it; default is by its device.
    """

    def __init__(
        self,
        model: Autoencoder,
        device: str = "cpu",
        precision: Precision = "float32",
        transport: Transport | None = None,
    ) -> None:
        self._model = model
        self._device = device
        self._precision = precision
        self._transport = transport or transport_to(device)
        self._tickets: deque[Any] = deque()
        self._halved = False  # the device has run out of memory

    def push(self, audio: FloatArray) -> Iterator[FloatArray]:
        """Queue a batch `[B, C, T]`; give the latents `[B, D, Z]` of earlier ones, or its own.

        Where the device's memory does not suffice, this batch and all later ones go in two halves.

        Raises:
            torch.OutOfMemoryError: It does not suffice for half a batch either.
        """
        sent = self._transport.send(audio)
        latents = self._encode(sent)
        if latents is None:
            torch.cuda.empty_cache()  # not in the handler, whose traceback holds activations
            latents = self._encode(sent)
            assert latents is not None, "it raises the second time"
        self._tickets.append(self._transport.fetch(latents))
        while len(self._tickets) > self._transport.ahead:
            yield self._transport.wait(self._tickets.popleft())

    def _encode(self, sent: Tensor) -> Tensor | None:
        """The latents; None the first time that memory runs out."""
        with numeric_mode(self._precision, self._device):
            try:
                if not self._halved:
                    return self._model.encode(sent)
                return torch.cat([self._model.encode(half) for half in sent.chunk(2)])
            except torch.OutOfMemoryError:
                if self._halved or len(sent) == 1:
                    raise
                self._halved = True
                return None

    def flush(self) -> Iterator[FloatArray]:
        """Give the latents of all batches that are still queued."""
        while self._tickets:
            yield self._transport.wait(self._tickets.popleft())
