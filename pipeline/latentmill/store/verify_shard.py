"""Checking a shard and its records, with one pass over its bytes."""

from __future__ import annotations

import os
from collections import deque
from typing import BinaryIO

import numpy as np
import xxhash

from latentmill.errors import StorageError, restore_hint
from latentmill.store.commit import HASH_BLOCK
from latentmill.store.index import IndexEntry, entries
from latentmill.store.prefetch import ranges_of
from latentmill.store.schema import Commit
from latentmill.store.store import LatentStore


def shard_faults(store: LatentStore, shard: str, commit: Commit) -> list[str]:
    """The faults of a shard, or of its records if the shard matches its commit, a line each.

    One record and a block of the shard are in memory.
    """
    fault, records = None, _PassingRecords(store, commit)
    try:
        with store.storage.open(shard) as file:
            size = file.seek(0, os.SEEK_END)
            if size != commit.bytes:
                fault = f"{shard} has {size} bytes, but its commit lists {commit.bytes}"
            elif _read(file, records) != commit.hash:
                fault = f"{shard} does not match the hash in its commit"
    except StorageError as error:
        fault = str(error).rstrip(".")
    if fault:
        return [f"{fault}: {restore_hint('the shard')}"]
    return records.faults()


def _read(file: BinaryIO, records: _PassingRecords) -> str:
    """Check the records in a shard; return the hash of its bytes."""
    digest = xxhash.xxh3_128()
    file.seek(0)
    while block := file.read(HASH_BLOCK):
        digest.update(block)
        records.add(block)
    return digest.hexdigest()


class _PassingRecords:
    """Checks each record of a shard when all of its bytes have been read."""

    def __init__(self, store: LatentStore, commit: Commit) -> None:
        self._store = store
        self._waiting = deque(sorted(enumerate(entries(commit)), key=lambda one: _first(one[1])))
        self._bytes, self._start = bytearray(), 0  # those read last, and where they are
        self._faults: list[tuple[int, str]] = []

    def add(self, block: bytes) -> None:
        """Take the next bytes, check the records that are complete, and drop what no one needs."""
        self._bytes += block
        end = self._start + len(self._bytes)
        while self._waiting and _end(self._waiting[0][1]) <= end:
            number, entry = self._waiting.popleft()
            for path, at, size in ranges_of(entry):
                with memoryview(self._bytes) as read:
                    data = bytes(read[at - self._start :][:size])
                self._store.ranges.put(path, at, data)
            self._check(number, entry)
        needed = _first(self._waiting[0][1]) if self._waiting else end
        used = min(max(0, needed - self._start), len(self._bytes))
        del self._bytes[:used]
        self._start += used

    def faults(self) -> list[str]:
        """The faults of all records, in the order of the plan."""
        while self._waiting:  # those that end after the shard
            self._check(*self._waiting.popleft())
        return [fault for _, fault in sorted(self._faults)]

    def _check(self, number: int, entry: IndexEntry) -> None:
        try:
            latent = self._store.read(entry).latent
        except StorageError as error:
            self._faults.append((number, str(error)))
        else:
            if not np.isfinite(latent).all():
                self._faults.append((number, f"the latent of {entry.key} contains NaN or Inf"))
        self._store.ranges.clear()


def _first(entry: IndexEntry) -> int:
    return min(at for _, at, _ in ranges_of(entry))


def _end(entry: IndexEntry) -> int:
    return max(at + size for _, at, size in ranges_of(entry))
