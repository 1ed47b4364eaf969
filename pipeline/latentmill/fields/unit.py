"""A unit of a field: the values that are kept, and the items that must be computed."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping

from latentmill.errors import StorageError
from latentmill.fields.inputs import Absent, Input, is_stale
from latentmill.plan import Unit
from latentmill.record import Outcome
from latentmill.storage.storage import Storage
from latentmill.store.commit import committed_revisions, read_commit
from latentmill.store.index import entries
from latentmill.store.schema import Commit, commit_path
from latentmill.store.store import LatentStore


class FieldUnit:
    """What a run does with each item of a unit.

    Attributes:
        inputs: What each value is computed from, by key.
        absent: The items that are skipped because the base store has no latent of them, by key,
            with the reason.
        todo: Keys of the items to compute.
        rest: Keys of the items that keep their value.
    """

    def __init__(
        self, storage: Storage, unit: Unit, inputs: Mapping[str, Input], *, retry_failed: bool
    ) -> None:
        """Compare the inputs of a unit with its last commit in the field.

        `unit.revision` is the one that will be written.
        """
        self.inputs = inputs
        self._storage = storage
        known = _last_commit(storage, unit)
        self._known = {} if known is None else {entry.key: entry for entry in known.items}
        self._places = {} if known is None else {entry.key: entry for entry in entries(known)}
        self.absent = {key: now.reason for key, now in inputs.items() if isinstance(now, Absent)}
        self.todo = (
            inputs.keys()
            - self.absent.keys()
            - {
                key
                for key, entry in self._known.items()
                if not (retry_failed and entry.status == "failed")
                and key in inputs
                and not is_stale(entry, inputs[key])
            }
        )
        self.rest = inputs.keys() - self.todo - self.absent.keys()

    def skipped(self) -> Iterator[Outcome]:
        """The outcomes of the absent items."""
        for key, reason in self.absent.items():
            yield Outcome(key, "skipped", reason)

    def kept(self) -> Iterator[Outcome]:
        """The outcomes of the items that keep their value. Reads the latents of their records."""
        store = None
        for key in self.inputs:
            if key in self.rest:
                if store is None:
                    store = LatentStore(self._storage.root)
                    store.annotations = None  # a shard has the metadata of the source
                entry, place = self._known[key], self._places.get(key)
                record = None if place is None else store.read(place)
                yield Outcome(key, entry.status, entry.reason, record)


class BaseCommits:
    """The commits of a base store, of which only the names are in memory.

    Units that are committed after this was made have no commit here.
    """

    def __init__(self, url: str) -> None:
        self._storage = Storage(url)
        self._revisions = committed_revisions(self._storage)

    def of(self, unit: str) -> Commit | None:
        if unit not in self._revisions:
            return None
        try:
            return read_commit(self._storage, unit, self._revisions[unit])
        except StorageError:  # replaced since
            self._revisions = committed_revisions(self._storage)
            return read_commit(self._storage, unit, self._revisions[unit])


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
