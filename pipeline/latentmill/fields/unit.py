"""A unit of a field: the values that are kept, and the items that must be computed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from latentmill.errors import StorageError
from latentmill.fields.base_rows import rows_of
from latentmill.fields.inputs import Absent, Input, is_stale
from latentmill.record import Outcome
from latentmill.storage.storage import Storage
from latentmill.store.commit import committed_revisions, read_commit
from latentmill.store.earlier import EarlierRecords
from latentmill.store.schema import Commit

OTHER_FILE = "its file is not the one that the store has encoded: restore that file"


class FieldUnit:
    """What a run does with each item of a unit.

    Attributes:
        inputs: What each value is computed from, by key.
        earlier: The values that the field has so far.
        absent: The items that are skipped because the base store has no latent of them, by key,
            with the reason.
        todo: Keys of the items to compute.
        rest: Keys of the items that keep their value.
        encoded_files: Hashes of the files that the base store has encoded, by key.
    """

    def __init__(
        self, earlier: EarlierRecords, inputs: Mapping[str, Input], *, retry_failed: bool
    ) -> None:
        """Compare the inputs of a unit with its last commit in the field."""
        self.encoded_files: Mapping[str, str] = {}
        self.inputs = inputs
        self.earlier = earlier
        self.absent = {key: now.reason for key, now in inputs.items() if isinstance(now, Absent)}
        self.todo = (
            inputs.keys()
            - self.absent.keys()
            - {
                key
                for key, entry in self.earlier.items.items()
                if not (retry_failed and (entry.status == "failed" or entry.kept))
                and key in inputs
                and not is_stale(entry, inputs[key])
            }
        )
        self.rest = inputs.keys() - self.todo - self.absent.keys()

    def is_other_file(self, key: str, content_hash: str) -> bool:
        """Whether a file is not the one that the base store has encoded."""
        return self.encoded_files.get(key, content_hash) != content_hash

    def skipped(self) -> Iterator[Outcome]:
        """The outcomes of the absent items."""
        for key, reason in self.absent.items():
            yield Outcome(key, "skipped", reason)

    def kept(self) -> Iterator[Outcome]:
        """The outcomes of the items that keep their value. Reads the latents of their records."""
        return self.earlier.outcomes([key for key in self.inputs if key in self.rest])


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

    def content_hashes(self, commit: Commit) -> dict[str, str]:
        """The hashes of the files of a unit's records, by key; of those that have one."""
        if commit.shard is None:
            return {}
        rows = rows_of(self._storage, commit)
        pairs = zip(rows["key"].to_pylist(), rows["content_hash"].to_pylist(), strict=True)
        return {key: content_hash for key, content_hash in pairs if content_hash}
