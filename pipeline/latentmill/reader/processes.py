"""Worker processes of a `Loader`, which make batches in memory that they share with the loader."""

from __future__ import annotations

import contextlib
import copy
import itertools
import mmap
import multiprocessing
import os
import pickle
import queue
import select
import signal
import socket
import threading
import time
import traceback
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing.connection import Connection
from multiprocessing.reduction import ForkingPickler, recv_handle, send_handle
from typing import Any, NoReturn

import numpy as np
import torch

from latentmill.errors import ConfigError, LatentmillError, WorkerError
from latentmill.reader.buffers import Released, Slot, create_memory, map_memory, unpack
from latentmill.reader.building import BatchBuilder
from latentmill.reader.draws import Requested

TOGETHER = 2  # batches of a remote store that a worker makes at the same time
SPARE = 2  # unused slots to keep for each worker, beside those of requested batches
CHECK_SECONDS = 1.0  # between checks whether the other process still runs
STOP_SECONDS = 2.0  # to finish a batch before a worker is killed
_LOST = (EOFError, ConnectionError)  # errors of a connection whose other end is gone


class InProcess:
    """Makes batches in this process, when they are received."""

    capacity = 1
    usable = True

    def __init__(self, builder: BatchBuilder, *, pin: bool) -> None:
        self._builder, self._pin = builder, pin
        self._requested: deque[Requested] = deque()

    def request(self, requested: Requested) -> None:
        self._requested.append(requested)

    def receive(self) -> Any:
        packed = self._builder.build(self._requested.popleft())
        memory = torch.empty(packed.size, dtype=torch.uint8, device="cpu", pin_memory=self._pin)
        packed.write(memory)
        return unpack(memory, packed.payload)

    def skip(self) -> None:
        self._requested.clear()

    def stop(self) -> None:
        self._requested.clear()


class Workers:
    """The worker processes, and the slots that their batches are in.

    Workers make batches in turn. The slots of a worker are used again when their batches are no
    longer referenced; while they are, it gets further ones.

    Args:
        builder: Makes the batches.
        count: Number of processes.
        prefetch: Number of batches that may be requested from each at once.
        method: How multiprocessing starts them: `fork`, `spawn` or `forkserver`.
        pin: Whether to page-lock the slots' memory.
    """

    def __init__(
        self, builder: BatchBuilder, count: int, *, prefetch: int, method: str | None, pin: bool
    ) -> None:
        self.capacity = count * prefetch
        self._turns = itertools.cycle(range(count))
        self._spare, self._pin, self._pid = prefetch + SPARE, pin, os.getpid()
        self._released = Released()
        self._unused: list[list[Slot]] = [[] for _ in range(count)]
        self._numbers = [0] * count  # of slots
        self._expected: deque[tuple[int, Slot]] = deque()  # worker and slot of requested batches
        self._workers: list[_Worker] = []
        try:
            context = multiprocessing.get_context(method)
        except ValueError as error:
            raise ConfigError(
                f"cannot start worker processes with {method!r}: use 'fork', 'spawn' or "
                "'forkserver'."
            ) from error
        try:
            for number in range(count):
                self._workers.append(_Worker(context, builder, number))
        except BaseException:
            self.stop()
            raise

    @property
    def usable(self) -> bool:
        """Whether this process has started them, and not one that it is a fork of."""
        return self._pid == os.getpid()

    def request(self, requested: Requested) -> None:
        """Let the next worker make a batch. If it has died, `receive` reports it in its turn."""
        worker = next(self._turns)
        for slot in self._released.take():
            self._unused[slot.worker].append(slot)
        unused = self._unused[worker]
        place = next((n for n in range(len(unused) - 1, -1, -1) if unused[n].reusable), None)
        if place is None:
            slot = Slot(self._numbers[worker], worker)
            self._numbers[worker] += 1
        else:
            slot = unused.pop(place)
        dropped = [unused.pop(0) for _ in range(len(unused) - self._spare)]
        for one in dropped:
            one.free()
        epoch, positions, numbers = requested
        # Lists, because pickling arrays takes ten times as long.
        samples = epoch, positions.tolist(), numbers.tolist()
        self._expected.append((worker, slot))  # first, so that `stop` frees the slot in any case
        self._workers[worker].send((slot.number, [one.number for one in dropped], samples))

    def receive(self) -> Any:
        """The batch that was requested first of those not received yet.

        Raises WorkerError if the worker has died, or the error that it made. Only `stop` may be
        called after an error.
        """
        worker, slot = self._expected[0]
        found = self._workers[worker].receive()
        if isinstance(found, _Failure):
            raise found.error()
        size, used, payload = found
        if size:
            slot.set_memory(self._workers[worker].receive_memory(size), pin=self._pin)
        self._expected.popleft()  # the batch has the slot now
        return slot.unpack(used, payload, self._released)

    def skip(self) -> None:
        """Receive and forget all requested batches."""
        while self._expected:
            self.receive()

    def stop(self) -> None:
        """End the processes. Batches that are still referenced keep their memory."""
        if not self.usable:
            return
        for worker in self._workers:
            worker.close()
        deadline = time.monotonic() + STOP_SECONDS
        for worker in self._workers:
            worker.end(deadline)
        self._released.close()
        for slot in itertools.chain(*self._unused, (slot for _, slot in self._expected)):
            slot.free()


class _Worker:
    """A worker process, as the main process sees it."""

    def __init__(self, context: Any, builder: BatchBuilder, number: int) -> None:
        self._connection, theirs = context.Pipe()
        self._readable = select.poll()
        self._readable.register(self._connection, select.POLLIN)
        self._process = context.Process(
            target=_work,
            args=(theirs, _Sent(builder)),
            name=f"latentmill-loader-{number}",
            daemon=True,
        )
        try:
            self._process.start()
        except BaseException:
            self._connection.close()
            raise
        finally:
            theirs.close()

    def send(self, message: object) -> None:
        """Send a message; `receive` reports a process that has ended, after what it has made."""
        with contextlib.suppress(*_LOST):
            self._connection.send_bytes(pickle.dumps(message))

    def receive(self) -> Any:
        try:
            while not self._readable.poll(CHECK_SECONDS * 1000):
                if not self._process.is_alive() and not self._connection.poll(0):
                    raise EOFError  # another process has inherited the connection
            return self._connection.recv()
        except _LOST as error:
            raise self._died() from error

    def receive_memory(self, size: int) -> torch.Tensor:
        try:
            return map_memory(recv_handle(self._connection), size)
        except (*_LOST, RuntimeError) as error:  # RuntimeError: no handle came
            raise self._died() from error

    def _died(self) -> WorkerError:
        self._process.join(CHECK_SECONDS)
        code = self._process.exitcode
        if code is None:
            how = "closed its connection"
        elif code < 0:
            how = f"was killed by {signal.Signals(-code).name}"
        else:
            how = f"ended with exit code {code}"
        advice = "see what it printed above"
        if code == -signal.SIGKILL:
            advice = "memory may have run out, so use fewer workers or smaller batches"
        return WorkerError(f"worker process {self._process.pid} of the Loader {how}: {advice}.")

    def close(self) -> None:
        """Tell the process to end."""
        # Unlike closing, this also reaches copies of the connection in workers that were forked.
        with (
            contextlib.suppress(OSError),  # the process has already ended
            socket.socket(fileno=os.dup(self._connection.fileno())) as theirs,
        ):
            theirs.shutdown(socket.SHUT_RDWR)
        self._connection.close()

    def end(self, deadline: float) -> None:
        """Wait for the process; kill it at the deadline."""
        self._process.join(max(0.0, deadline - time.monotonic()))
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
        self._process.close()


class _Failure:
    """An error of a worker, picklable whatever the error is."""

    def __init__(self, error: Exception) -> None:
        self._where = traceback.format_exc(limit=-20)[-20_000:]
        try:
            self._pickled = pickle.dumps(error)
            pickle.loads(self._pickled)  # noqa: S301  some errors can be pickled but not loaded
        except Exception as cause:  # noqa: BLE001  any class of error may define its pickling
            text = f"a worker process of the Loader failed with {type(error).__name__}: {error}"
            self._pickled = pickle.dumps(WorkerError(f"{text} ({cause})"))

    def error(self) -> Exception:
        error: Exception = pickle.loads(self._pickled)  # noqa: S301  from our own process
        if not isinstance(error, LatentmillError):
            error.add_note(f"In a worker process of the Loader:\n{self._where}")
        return error


class _Sent:
    """The builder, as a worker gets it.

    A worker that is not forked unpickles it in `builders`, since an error before `_work` would end
    the worker.
    """

    def __init__(self, builder: BatchBuilder) -> None:
        self._builder = builder

    def __getstate__(self) -> bytes:
        return bytes(ForkingPickler.dumps(self._builder))

    def __setstate__(self, pickled: bytes) -> None:
        self._pickled = pickled

    def builders(self) -> list[BatchBuilder]:
        """One for each batch that the worker makes at the same time.

        Each has its own copy of the readers, which are not thread-safe.
        """
        if hasattr(self, "_pickled"):
            self._builder = pickle.loads(self._pickled)  # noqa: S301  from our own process
            del self._pickled  # the process keeps its arguments
        builder = self._builder
        copies = TOGETHER - 1 if builder.remote else 0
        return [builder, *(copy.deepcopy(builder) for _ in range(copies))]


def _work(connection: Connection, sent: _Sent) -> None:
    """Make the requested batches until the main process closes the connection or is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to all processes of a terminal
    torch.set_num_threads(1)
    threading.Thread(target=_exit_with, args=(os.getppid(),), daemon=True).start()
    slots: dict[int, torch.Tensor] = {}
    with contextlib.suppress(*_LOST):
        try:
            builders = sent.builders()
        except Exception as error:  # noqa: BLE001  goes to the main process, whatever it is
            _fail(connection, _Failure(error))
        if len(builders) > 1:
            _make_together(connection, builders, slots)
        while True:
            _send(connection, *_make(builders[0], slots, *_next_request(connection, slots)))


def _fail(connection: Connection, failure: _Failure) -> NoReturn:
    """Answer every request with an error."""
    while True:
        connection.recv()
        _send(connection, failure, -1)


def _make_together(
    connection: Connection, builders: list[BatchBuilder], slots: dict[int, torch.Tensor]
) -> NoReturn:
    """Make several batches at the same time, since a remote store answers slowly."""
    threads = [ThreadPoolExecutor(1) for _ in builders]
    made: queue.SimpleQueue[Future[tuple[object, int]]] = queue.SimpleQueue()

    def take_requests() -> None:
        try:
            for thread, builder in itertools.cycle(zip(threads, builders, strict=True)):
                request = _next_request(connection, slots)
                made.put(thread.submit(_make, builder, slots, *request))
        except BaseException as error:  # noqa: BLE001  raised where the batches are sent
            failed: Future[tuple[object, int]] = Future()
            failed.set_exception(error)
            made.put(failed)

    threading.Thread(target=take_requests, daemon=True).start()
    while True:  # in the main thread, where any error ends the process
        _send(connection, *made.get().result())


def _next_request(connection: Connection, slots: dict[int, torch.Tensor]) -> tuple[int, Requested]:
    """The slot and the samples of the next batch."""
    number, dropped, (epoch, positions, numbers) = connection.recv()
    for one in dropped:
        slots.pop(one, None)
    return number, Requested(epoch, np.array(positions, np.int64), np.array(numbers, np.int64))


def _make(
    builder: BatchBuilder, slots: dict[int, torch.Tensor], number: int, requested: Requested
) -> tuple[object, int]:
    """Make a batch in a slot. Returns the answer and, if the slot got new memory, its file."""
    try:
        packed = builder.build(requested)
        size, file = 0, -1
        if number not in slots or slots[number].numel() < packed.size:
            size = _size_for(packed.size, slots.pop(number, None))
            file = create_memory(size)
            slots[number] = map_memory(os.dup(file), size)
        packed.write(slots[number])
    except Exception as error:  # noqa: BLE001  goes to the main process, whatever it is
        return _Failure(error), -1
    return (size, packed.size, packed.payload), file


def _send(connection: Connection, answer: object, file: int) -> None:
    connection.send_bytes(pickle.dumps(answer))
    if file >= 0:
        send_handle(connection, file, os.getppid())
        os.close(file)


def _size_for(needed: int, before: torch.Tensor | None) -> int:
    """Size of memory for a batch and for later ones, whose metadata may be longer.

    It grows by half at least, since batches of whole items differ more.
    """
    grown = 0 if before is None else before.numel() + before.numel() // 2
    return max(needed + needed // 16 + mmap.PAGESIZE, grown)


def _exit_with(parent: int) -> None:
    """End this process when its parent has ended, also while it is reading or writing."""
    while os.getppid() == parent:
        time.sleep(CHECK_SECONDS)
    os._exit(1)
