"""Publishing a view: its latents are copied to shards of a store of its own, a few at a time.

That store is in a temporary folder without the shards that the repository has already. What
continues an interrupted call is in the repository: the plan, and the commits of whole units.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

from latentmill.curation.copying import CopiedRecords, copy_units, plan_copy
from latentmill.curation.selecting import Selector
from latentmill.errors import ConfigError
from latentmill.plan import Plan, copy
from latentmill.publishing.contents import (
    StoreFile,
    StoreFiles,
    contents_of,
    hashed,
    plan_files,
)
from latentmill.storage.storage import Storage
from latentmill.storage.threads import map_in_threads
from latentmill.store.commit import READERS, committed_revisions
from latentmill.store.schema import CARD_PATH, SHARDS, commit_path
from latentmill.store.seal import read_origin, seal, write_origin
from latentmill.store.store import LatentStore
from latentmill.text.printing import counted

SELECTION = "view"  # in the plan's settings of the source: the hash of the view


class StagedView:
    """A store with the records of a view, on its way to a repository.

    Args:
        view: The view.
        folder: An empty temporary folder.
        published: The repository.
        existing: The plan that it has, if an earlier call has begun to publish this view.

    Raises:
        ConfigError: The repository has another store.
    """

    def __init__(
        self, view: LatentStore, folder: str, published: Storage, existing: Plan | None
    ) -> None:
        self.storage, self._published = Storage(folder), published
        self._records = CopiedRecords([Selector(view).chosen()])
        self._new, settings = existing is None, {SELECTION: self._records.digest}
        write_origin(self.storage, read_origin(view.storage))
        if own := view.storage.read_if_exists(CARD_PATH):  # written by hand
            self.storage.write(CARD_PATH, own)
        if existing is None:
            self._plan = plan_copy(self.storage, self._records, _origin(view), settings)
            return
        if existing.source_settings != settings:
            raise ConfigError(
                f"{published.root} has another store, or an earlier version of this view (its "
                "records or metadata have changed since): use a new repository."
            )
        self._plan = existing
        copy(existing, published, self.storage)
        paths = [commit_path(*pair) for pair in committed_revisions(published).items()]
        found = map_in_threads(published.read, paths, threads=READERS, prefetch=READERS)
        with contextlib.closing(found):
            for path, data in zip(paths, found, strict=True):
                self.storage.write(path, data)

    def batches(self, units: int) -> Iterator[Sequence[StoreFile]]:
        """Write the units that the repository lacks. Yields the files of a few units.

        Their shards are deleted when the next ones are asked for.
        """
        batch = list(plan_files(self.storage, self._plan)) if self._new else []
        shards: list[str] = []
        sizes = self._published.list(SHARDS)
        for number, commit in enumerate(
            copy_units(self.storage, self._plan, self._records, sizes), start=1
        ):
            if commit.shard is not None and commit.hash is not None:
                batch.append(StoreFile(commit.shard, commit.bytes, commit.hash))
                shards.append(commit.shard)
            batch.append(hashed(self.storage, commit_path(commit.unit, commit.revision)))
            if number % units == 0:
                yield batch
                for path in shards:
                    self.storage.delete(path)
                batch, shards = [], []
        if batch:
            yield batch

    def sealed(self) -> StoreFiles:
        """Seal the store, when all shards are in the repository."""
        self._published.list(SHARDS)  # fsspec would use the listing from before they were written
        seal(self.storage, self._plan, shards=self._published)
        return contents_of(self.storage.root)


def _origin(view: LatentStore) -> str:
    """What the records were selected from, without addresses."""
    info = view.info
    left_out = ", ".join(f"{count} {reason}" for reason, count in (info.left_out or {}).items())
    text = f"{_name(view.url)}: {info.encoded} of {counted(info.items, 'record')} of "
    text += ", ".join(dict.fromkeys(_name(base.url) for base in info.bases))
    return f"{text}; left out: {left_out}" if left_out else text


def _name(url: str) -> str:
    return url.rstrip("/").rpartition("/")[2]
