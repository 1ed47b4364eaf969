"""Reading the bytes of many records in a few requests, before the records are read one by one."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from latentmill.errors import StorageError
from latentmill.storage.storage import Storage
from latentmill.store.index import IndexEntry

if TYPE_CHECKING:
    from latentmill.store.store import LatentStore

Range = tuple[str, int, int]  # path, offset and length

GROUP_BYTES = 16 << 20  # of records that are read together; a larger one is read alone
_GROUP_RECORDS = 1024
_REQUEST_BYTES = 4 << 20  # most bytes of a request for several records
_MAX_GAP = 1 << 14  # bytes between two records up to which one request reads both and the gap


class PrefetchedRanges:
    """Byte ranges of shards that were read before they are needed; others are read when needed."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self._found: dict[Range, memoryview] = {}

    def read(self, path: str, offset: int, length: int) -> bytes:
        """Read a range; one that was read before is released."""
        found = self._found.pop((path, offset, length), None)
        return self._storage.read_range(path, offset, length) if found is None else bytes(found)

    def put(self, path: str, offset: int, data: bytes) -> None:
        """Keep a range that the caller has read."""
        self._found[path, offset, len(data)] = memoryview(data)

    def fetch(self, entries: Sequence[IndexEntry]) -> None:
        """Read the bytes of records in one round of requests.

        If a request fails, none are kept: reading a record reports its own error.
        """
        self.clear()
        ranges = sorted(one for entry in entries for one in ranges_of(entry))
        requests = list(_merged(ranges))
        with contextlib.suppress(StorageError):
            blocks = self._storage.read_ranges([(path, at, size) for path, at, size, _ in requests])
            for (_, start, _, inside), block in zip(requests, blocks, strict=True):
                for path, at, size in inside:
                    self._found[path, at, size] = memoryview(block)[at - start :][:size]

    def clear(self) -> None:
        self._found.clear()


def prefetched(store: LatentStore, entries: Iterable[IndexEntry]) -> Iterator[IndexEntry]:
    """Yield the entries of records that are read in this order, each with `store.read`.

    Of a remote store, the bytes of a group of records are read in a few requests.
    """
    if store.storage.local:
        yield from entries
        return
    try:
        for group in _groups(entries):
            store.ranges.fetch(group)
            yield from group
    finally:
        store.ranges.clear()


def ranges_of(entry: IndexEntry) -> list[Range]:
    """The ranges that reading a record reads: its latent, and in a tar its fields."""
    latent = (entry.shard, entry.offset, entry.length)
    if entry.fields_offset < 0:
        return [latent]
    return [(entry.shard, entry.fields_offset, entry.fields_length), latent]


def _groups(entries: Iterable[IndexEntry]) -> Iterator[list[IndexEntry]]:
    group: list[IndexEntry] = []
    size = 0
    for entry in entries:
        own = sum(length for _, _, length in ranges_of(entry))
        if group and (size + own > GROUP_BYTES or len(group) == _GROUP_RECORDS):
            yield group
            group, size = [], 0
        group.append(entry)
        size += own
    if group:
        yield group


def _merged(ranges: Iterable[Range]) -> Iterator[tuple[str, int, int, list[Range]]]:
    """Requests for sorted ranges: path, offset and length, and the ranges that each one reads."""
    inside: list[Range] = []
    first = last = 0
    for path, at, size in ranges:
        near = inside and inside[0][0] == path and at <= last + _MAX_GAP
        if not near or max(last, at + size) - first > _REQUEST_BYTES:
            if inside:
                yield inside[0][0], first, last - first, inside
            inside, first, last = [], at, at
        inside.append((path, at, size))
        last = max(last, at + size)
    if inside:
        yield inside[0][0], first, last - first, inside
