"""Writes a unit's shard in a thread of its own, so that the model does not wait for it."""

from __future__ import annotations

import queue
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from latentmill.record import Outcome

OUTCOMES_WAITING = 8  # encoded items that wait for being written
_CHECK_SECONDS = 0.2

T = TypeVar("T")


def written_beside(outcomes: Iterable[Outcome], write: Callable[[Iterator[Outcome]], T]) -> T:
    """Iterate over `outcomes` in this thread and call `write` with them in another one.

    Returns what `write` returns. An exception of either side is raised in the other one, too, and
    by this function.
    """
    waiting: queue.Queue[Outcome | BaseException | None] = queue.Queue(OUTCOMES_WAITING)

    def received() -> Iterator[Outcome]:
        while (one := waiting.get()) is not None:
            if isinstance(one, BaseException):
                raise one
            yield one

    with ThreadPoolExecutor(1, thread_name_prefix="write") as pool:
        done = pool.submit(write, received())
        last: BaseException | None = None
        try:
            for outcome in outcomes:
                if not _put(waiting, outcome, done):
                    break
        except BaseException as error:  # noqa: BLE001  `write` raises it, after cleaning up
            last = error
        _put(waiting, last, done)
        return done.result()


def _put(
    waiting: queue.Queue[Outcome | BaseException | None],
    one: Outcome | BaseException | None,
    done: Future[T],
) -> bool:
    """Wait for space in the queue. False if nobody takes from it any more."""
    while not done.done():
        try:
            waiting.put(one, timeout=_CHECK_SECONDS)
        except queue.Full:
            continue
        return True
    return False
