"""The records of a unit before it is encoded again."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from functools import cached_property

from latentmill.errors import DamagedShardError
from latentmill.plan import Unit
from latentmill.record import Outcome
from latentmill.storage.storage import Storage
from latentmill.store.commit import read_commit
from latentmill.store.index import entries
from latentmill.store.prefetch import prefetched
from latentmill.store.schema import Commit, commit_path
from latentmill.store.store import LatentStore


class EarlierRecords:
    """What the last commit of a unit has. Nothing, if its shard is missing or truncated.

    Attributes:
        items: The entries of its items, by key.
        encoded: Keys of the items that it has a record of.
    """

    def __init__(self, storage: Storage, unit: Unit) -> None:
        """Find the last commit; `unit.revision` is the one that will be written."""
        self._storage = storage
        known = _last_commit(storage, unit)
        self.items = {} if known is None else {entry.key: entry for entry in known.items}
        self._places = {} if known is None else {entry.key: entry for entry in entries(known)}
        self.encoded = frozenset(self._places)

    @cached_property
    def _store(self) -> LatentStore:
        store = LatentStore(self._storage.root)
        store.annotations = None  # a shard has the metadata of the source
        return store

    def outcomes(self, keys: Sequence[str]) -> Iterator[Outcome]:
        """The outcomes of items, whose records are read in groups."""
        places = [self._places[key] for key in keys if key in self._places]
        ahead = prefetched(self._store, places) if places else iter(places)
        for key in keys:
            if key in self._places:
                next(ahead)  # now its bytes are in memory
            yield self.outcome(key)

    def outcome(self, key: str, reason: str | None = None) -> Outcome:
        """The outcome of an item, with its record. Reads the latent.

        `reason` tells why an item with a record could not be encoded again. Then the item fails if
        the record is damaged; otherwise that raises DamagedShardError.
        """
        entry, place = self.items[key], self._places.get(key)
        try:
            record = None if place is None else self._store.read(place)
        except DamagedShardError:
            if reason is None:
                raise
            return Outcome(key, "failed", f"{reason}; its earlier latent is damaged")
        return Outcome(key, entry.status, reason or entry.reason, record)


def _last_commit(storage: Storage, unit: Unit) -> Commit | None:
    """The commit that counts so far; None if there is none, or its shard is missing or cut."""
    for revision in range(unit.revision - 1, -1, -1):
        if storage.exists(commit_path(unit.name, revision)):
            commit = read_commit(storage, unit.name, revision)
            return commit if _is_whole(storage, commit) else None
    return None


def _is_whole(storage: Storage, commit: Commit) -> bool:
    if commit.shard is None:
        return True
    if not storage.exists(commit.shard):
        return False
    with storage.open(commit.shard) as file:
        return file.seek(0, os.SEEK_END) == commit.bytes
