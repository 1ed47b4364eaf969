"""Slow work beside the event loop: in a thread, one at a time, stopped when nobody waits for it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TypeVar

import anyio
import anyio.to_thread
from starlette.requests import Request

from latentmill.errors import LatentmillError

T = TypeVar("T")

MOST_WAITING = 16
_POLL_SECONDS = 0.2


class BusyError(LatentmillError):
    """Too many requests wait for the same resource."""


class GoneError(Exception):
    """The client no longer waits for the result."""


class Queue:
    """Runs functions in a thread, one after the other."""

    def __init__(self) -> None:
        self._limiter = anyio.CapacityLimiter(1)
        self._waiting = 0

    async def run(self, request: Request, work: Callable[[Callable[[], None]], T]) -> T:
        """Call `work` with a function that it calls often, which raises when the client is gone.

        Raises:
            BusyError: Too many requests wait already.
            GoneError: The client is gone.
        """
        if self._waiting >= MOST_WAITING:
            raise BusyError("The server is busy with other requests: try again in a moment.")
        stop = threading.Event()
        results: list[T] = []
        errors: list[Exception] = []

        def check() -> None:
            if stop.is_set():
                raise GoneError

        def guarded() -> None:
            try:
                check()
                results.append(work(check))
            except Exception as error:  # noqa: BLE001  raised again below
                errors.append(error)

        async def cancel_if_gone(scope: anyio.CancelScope) -> None:
            while not await request.is_disconnected():
                await anyio.sleep(_POLL_SECONDS)
            stop.set()
            scope.cancel()

        self._waiting += 1
        try:
            async with anyio.create_task_group() as group:
                group.start_soon(cancel_if_gone, group.cancel_scope)
                await anyio.to_thread.run_sync(guarded, limiter=self._limiter)
                group.cancel_scope.cancel()
        finally:
            self._waiting -= 1
        if errors:
            raise errors[0]
        if not results:
            raise GoneError
        return results[0]
