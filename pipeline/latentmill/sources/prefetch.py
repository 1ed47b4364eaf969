"""Prefetches in threads: the items of a listing, and the recordings that are loaded next.

For small objects the latency of a request is longer than the transfer. Several requests at once
keep load threads from waiting. The bytes in memory are bounded.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from latentmill.audio.media import MediaFile, is_remote
from latentmill.sources.base import Item, TableCell
from latentmill.storage.closeable import Closeable
from latentmill.storage.remote import protocol_of

FETCH_THREADS = 8
PREFETCH_ITEMS = 32
OBJECT_STORAGE = ("s3", "s3a", "gs", "gcs", "az", "abfs", "abfss")
OBJECT_THREADS = 64  # object storage accepts more requests at once than a web server
OBJECT_ITEMS = 128
PREFETCH_BYTES = 128 << 20
LARGEST = 16 << 20  # larger files are fetched by several requests at once anyway
UNKNOWN_SIZE = LARGEST  # assumed for items whose size is unknown


class Prefetch(Closeable):
    """Opens the next items in threads. Thread-safe.

    `items` are in the order in which they will be opened. `open_item` opens an item.
    `fetch_item` opens an item early, or returns None for an item that should not be prefetched.
    Both are called from several threads.
    """

    def __init__(
        self,
        items: Sequence[Item],
        open_item: Callable[[Item], MediaFile],
        fetch_item: Callable[[Item], MediaFile | None],
    ) -> None:
        self._items = [item for item in items if prefetchable(item)]
        self._index = {item.key: index for index, item in enumerate(self._items)}
        self._open, self._fetch_item = open_item, fetch_item
        self._lock = threading.Lock()
        self._next = 0  # index of the next item to prefetch
        self._sizes: dict[str, int] = {}  # of the prefetched items that are not opened yet
        self._futures: dict[str, Future[MediaFile | None]] = {}
        objects = all(protocol_of(item.uri) in OBJECT_STORAGE for item in self._items)
        self._limit = OBJECT_ITEMS if objects else PREFETCH_ITEMS
        threads = OBJECT_THREADS if objects else FETCH_THREADS
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="prefetch")

    def open(self, item: Item) -> MediaFile:
        """Open an item's recording; the caller closes it. Raises what `open_item` raises."""
        future = self._pop(item)
        media = None if future is None else future.result()
        return self._open(item) if media is None else media

    def release(self, item: Item) -> None:
        """Close the item's recording if it was prefetched but not opened."""
        if (future := self._pop(item)) is not None:
            future.add_done_callback(_close)

    def stop(self) -> None:
        """Prefetch no more items."""
        with self._lock:
            self._next = len(self._items)

    def close(self) -> None:
        """Close prefetched recordings, after waiting for the running requests."""
        self.stop()
        with self._lock:
            futures = list(self._futures.values())
            self._futures.clear()
        for future in futures:
            future.cancel()
            future.add_done_callback(_close)
        self._pool.shutdown(wait=True)

    def _pop(self, item: Item) -> Future[MediaFile | None] | None:
        with self._lock:
            future = self._futures.pop(item.key, None)
            self._sizes.pop(item.key, None)
            self._next = max(self._next, self._index.get(item.key, -1) + 1)
            # Submit the next items up to the limits, and at least one.
            while self._next < len(self._items) and len(self._futures) < self._limit:
                upcoming = self._items[self._next]
                if self._futures and sum(self._sizes.values()) + _size(upcoming) > PREFETCH_BYTES:
                    break
                self._sizes[upcoming.key] = _size(upcoming)
                self._futures[upcoming.key] = self._pool.submit(self._fetch, upcoming)
                self._next += 1
        return future

    def _fetch(self, item: Item) -> MediaFile | None:
        media = self._fetch_item(item)
        with self._lock:
            if item.key in self._sizes:  # replace the expected size by the actual one
                self._sizes[item.key] = media.size if media is not None else 0
        return media


def prefetchable(item: Item) -> bool:
    """Whether an item is a small remote file or member that it shares with no other item."""
    shared = item.segment is not None or isinstance(item.place, TableCell)
    return is_remote(item.uri) and not shared and _size(item) <= LARGEST


def _size(item: Item) -> int:
    return item.size or UNKNOWN_SIZE


def _close(done: Future[MediaFile | None]) -> None:
    if not done.cancelled() and done.exception() is None and (media := done.result()) is not None:
        media.close()
