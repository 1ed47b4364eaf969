"""Load threads that no lane needs load pieces of long recordings."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeAlias

from latentmill.audio.pieces import Piece
from latentmill.encoding.timings import Timings

_Offer: TypeAlias = tuple["Future[Piece]", Callable[[], Piece]]


class IdleThreads:
    """Pieces that idle threads of a unit may load: the `Helpers` of `audio/pieces.py`.

    `changed` is the condition on which the threads wait. At most one piece more than there are
    threads is offered, or loaded and not taken, so memory is bounded.
    """

    def __init__(self, changed: threading.Condition, threads: int, timings: Timings) -> None:
        self.prefetch = threads + 1 if threads > 1 else 0
        self._changed = changed
        self._timings = timings
        self._offers: deque[_Offer] = deque()
        self._outstanding = 0

    def offer(self, load: Callable[[], Piece]) -> Future[Piece] | None:
        """See `Helpers`."""
        with self._changed:
            if self._outstanding >= self.prefetch:
                return None
            self._outstanding += 1
            future: Future[Piece] = Future()
            self._offers.append((future, load))
            self._changed.notify_all()
        return future

    def take(self, future: Future[Piece]) -> Piece | None:
        """See `Helpers`. While another thread loads the piece, this one loads later ones."""
        try:
            if future.cancel():
                return None
            while not future.done() and self.load_one():
                pass
            return future.result()
        finally:
            self._forget()

    def withdraw(self, future: Future[Piece]) -> None:
        """See `Helpers`."""
        future.cancel()
        self._forget()

    def _forget(self) -> None:
        with self._changed:
            self._outstanding -= 1

    @property
    def waiting(self) -> bool:
        """Whether a piece waits for a thread. Call it with `changed` held."""
        while self._offers and self._offers[0][0].cancelled():
            self._offers.popleft()
        return bool(self._offers)

    def load_one(self) -> bool:
        """Load a piece that waits; False if there is none."""
        with self._changed:
            if not self.waiting:
                return False
            future, load = self._offers.popleft()
        if not future.set_running_or_notify_cancel():
            return True
        began = time.perf_counter()
        try:
            future.set_result(load())
        except Exception as error:  # noqa: BLE001  `take` raises it
            future.set_exception(error)
        self._timings.add("decode_seconds", time.perf_counter() - began)
        return True
