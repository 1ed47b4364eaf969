"""Fetching the recordings of coming items while earlier ones are decoded.

Small objects take longer to ask for than to carry: a few are asked for at once, so that a decode
thread seldom waits for one. What waits in memory is bounded.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from latentmill.audio.media import MediaFile, is_remote
from latentmill.sources.base import Item, TableCell
from latentmill.storage.closeable import Closeable

FETCH_THREADS = 8
ITEMS_AHEAD = 32
BYTES_AHEAD = 128 << 20
LARGEST = 16 << 20  # a longer file is fetched by several requests at once anyway
UNKNOWN_SIZE = LARGEST


class Prefetch(Closeable):
    """Opens items in the order in which they will be asked for. Thread-safe.

    Args:
        items: All that may be asked for, in order.
        open_item: Opens one; called from several threads.
        fetch_item: Opens one ahead; gives None to leave it until it is asked for.
    """

    def __init__(
        self,
        items: Sequence[Item],
        open_item: Callable[[Item], MediaFile],
        fetch_item: Callable[[Item], MediaFile | None],
    ) -> None:
        self._items = [item for item in items if prefetchable(item)]
        self._place = {item.key: place for place, item in enumerate(self._items)}
        self._open, self._fetch_item = open_item, fetch_item
        self._lock = threading.Lock()
        self._next = 0  # the first item that is not asked for
        self._sizes: dict[str, int] = {}  # of those that were asked for and not taken
        self._coming: dict[str, Future[MediaFile | None]] = {}
        self._pool = ThreadPoolExecutor(FETCH_THREADS, thread_name_prefix="fetch-ahead")

    def open(self, item: Item) -> MediaFile:
        """An item's recording, the caller's to close.

        Raises:
            ItemError, ConfigError: As opening it does.
        """
        coming = self._take(item)
        media = None if coming is None else coming.result()
        return self._open(item) if media is None else media

    def let_go(self, item: Item) -> None:
        """The item is over; what nobody opened of it is closed."""
        if (coming := self._take(item)) is not None:
            coming.add_done_callback(_close)

    def stop(self) -> None:
        """Ask for nothing more."""
        with self._lock:
            self._next = len(self._items)

    def close(self) -> None:
        """Close what is there, and wait for what is on its way."""
        self.stop()
        with self._lock:
            coming = list(self._coming.values())
            self._coming.clear()
        for one in coming:
            one.cancel()
            one.add_done_callback(_close)
        self._pool.shutdown(wait=True)

    def _take(self, item: Item) -> Future[MediaFile | None] | None:
        with self._lock:
            coming = self._coming.pop(item.key, None)
            self._sizes.pop(item.key, None)
            self._next = max(self._next, self._place.get(item.key, -1) + 1)
            self._ask()
        return coming

    def _ask(self) -> None:
        """Ask for as many items as there is room for; one at least."""
        while self._next < len(self._items) and len(self._coming) < ITEMS_AHEAD:
            item = self._items[self._next]
            if self._coming and sum(self._sizes.values()) + _size(item) > BYTES_AHEAD:
                return
            self._sizes[item.key] = _size(item)
            self._coming[item.key] = self._pool.submit(self._fetch, item)
            self._next += 1

    def _fetch(self, item: Item) -> MediaFile | None:
        media = self._fetch_item(item)
        with self._lock:
            if item.key in self._sizes:  # now it is known
                self._sizes[item.key] = media.size if media is not None else 0
        return media


def prefetchable(item: Item) -> bool:
    """Whether an item has bytes of its own elsewhere, and not many."""
    shared = item.segment is not None or isinstance(item.place, TableCell)
    return is_remote(item.uri) and not shared and _size(item) <= LARGEST


def _size(item: Item) -> int:
    return item.size or UNKNOWN_SIZE


def _close(done: Future[MediaFile | None]) -> None:
    if not done.cancelled() and done.exception() is None and (media := done.result()) is not None:
        media.close()
