"""Work in threads, with a bounded number of results in memory."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


def map_in_threads(
    work: Callable[[T], R], given: Iterable[T], *, threads: int, prefetch: int
) -> Generator[R]:
    """Map in threads and yield the results in order; at most `prefetch` of them are in memory.

    Closing the generator cancels what has not begun.
    """
    running: deque[Future[R]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        try:
            for one in given:
                running.append(pool.submit(work, one))
                if len(running) >= prefetch:
                    yield running.popleft().result()
            while running:
                yield running.popleft().result()
        finally:
            for future in running:
                future.cancel()
