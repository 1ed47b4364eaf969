"""The files that a sealed store consists of, in the order in which a copy must write them.

Leftovers do not belong to them: superseded revisions, temporary files, locks. Every file has a hash
from the seal or a commit. Small files without one are hashed when they are listed, so that a change
while they are copied is noticed.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from dataclasses import dataclass

import xxhash

from latentmill.errors import StoreError
from latentmill.plan import BATCH_PATH, PLAN_PATH, Plan
from latentmill.storage.storage import Storage, file_in_store
from latentmill.storage.threads import map_in_threads
from latentmill.store.annotations import ANNOTATIONS, annotation_path
from latentmill.store.bases import needs_copy
from latentmill.store.commit import READERS, SealHash, hash_of
from latentmill.store.describe import is_complete
from latentmill.store.measurement import EVALUATION
from latentmill.store.results import VECTORS_FILE
from latentmill.store.schema import (
    CARD_PATH,
    DATASET_PATH,
    ORIGIN_PATH,
    Commit,
    DatasetInfo,
    commit_path,
    parse_document,
)
from latentmill.store.store import LatentStore


@dataclass(frozen=True)
class StoreFile:
    """A file of a store.

    Attributes:
        path: Its path in the store.
        size: In bytes.
        hash: xxh3-128 of its content, hex.
        replaced: Whether a later seal has other content under the same name. Such files are small.
    """

    path: str
    size: int
    hash: str
    replaced: bool = False

    def matches(self, size: int, digest: str) -> bool:
        return (size, digest) == (self.size, self.hash)


@dataclass(frozen=True)
class UnitFiles:
    """The files of a unit: the shard, if an item of the unit was encoded, and then the commit."""

    unit: str
    revision: int
    shard: StoreFile | None
    commit: StoreFile


@dataclass(frozen=True)
class StoreFiles:
    """The files of a complete store. Copies write `first`, `units`, `last` and `seal`.

    Attributes:
        storage: Where they are.
        store: The store.
        plan: Its plan.
        first: Plan and origin; plan.json after the files that it lists.
        units: Shards and commits.
        last: What the seal refers to, and results of evaluations.
        seal: The bytes of dataset.json, which make the copy a sealed store.
    """

    storage: Storage
    store: LatentStore
    plan: Plan
    first: tuple[StoreFile, ...]
    units: tuple[UnitFiles, ...]
    last: tuple[StoreFile, ...]
    seal: bytes

    @property
    def info(self) -> DatasetInfo:
        return self.store.info

    def files(self) -> Iterator[StoreFile]:
        """All files but dataset.json, in the order in which a copy must write them."""
        yield from self.first
        for unit in self.units:
            if unit.shard is not None:
                yield unit.shard
            yield unit.commit
        yield from self.last


def contents_of(url: str) -> StoreFiles:
    """List the files of a complete store. Reads its commits and checks them against the seal.

    Raises:
        StoreError: It is not a complete store, is a view, or is damaged.
    """
    storage = Storage(url)
    seal = storage.read_if_exists(DATASET_PATH)
    hint = "delete it and run again to seal the store"
    where = f"{storage.root}/{DATASET_PATH}"
    sealed = None if seal is None else parse_document(DatasetInfo, seal, where, hint)
    if sealed is not None and sealed.bases:
        raise needs_copy(storage.root)
    store = LatentStore(url)
    if seal is None or not is_complete(store):
        raise StoreError(
            f"{storage.root} is not complete: run the same encode command again to finish it."
        )
    if sealed != store.info:
        raise changed(storage)
    plan, info = store.plan, store.info
    last = [hashed(storage, path, digest) for path, digest in _sealed_files(info)]
    last += [hashed(storage, path, digest) for path, digest in _annotations(storage, info)]
    last += _results(storage)
    if storage.exists(CARD_PATH):
        last.append(hashed(storage, CARD_PATH, replaced=True))
    units = tuple(_units(storage, store))
    return StoreFiles(storage, store, plan, plan_files(storage, plan), units, tuple(last), seal)


def plan_files(storage: Storage, plan: Plan) -> tuple[StoreFile, ...]:
    """The files of the plan, of which plan.json is after those that it lists, and the origin."""
    first = [
        file
        for part in plan.parts
        for file in (
            StoreFile(part.items_file, part.items_bytes, part.items_hash.removeprefix("xxh3:")),
            hashed(storage, part.units_file),
        )
    ]
    first += [hashed(storage, path, replaced=True) for path in (PLAN_PATH, ORIGIN_PATH)]
    if storage.exists(BATCH_PATH):
        first.append(hashed(storage, BATCH_PATH, replaced=True))
    return tuple(first)


def damaged(storage: Storage, path: str) -> StoreError:
    """The error for a file that does not have the content that the store lists."""
    return StoreError(
        f"{storage.root}/{path} is damaged: restore it from a copy of the store, or delete it and "
        "run the same encode command again."
    )


def changed(storage: Storage) -> StoreError:
    """The error for a store that is sealed again while it is copied."""
    return StoreError(f"{storage.root} was changed while it was read: run the same command again.")


def _sealed_files(info: DatasetInfo) -> Iterator[tuple[str, str | None]]:
    yield info.index, info.index_hash
    if info.metadata is not None:
        yield info.metadata, info.metadata_hash


def _annotations(storage: Storage, info: DatasetInfo) -> Iterator[tuple[str, str]]:
    """Path and hash of each version of the annotations; earlier versions may have been deleted."""
    if info.annotation is None:
        return
    there = storage.list(ANNOTATIONS)
    for version, digest in enumerate(info.annotation.hashes, start=1):
        path = annotation_path(version)
        if version == info.annotation.version or path.rpartition("/")[2] in there:
            yield path, digest


def _results(storage: Storage) -> Iterator[StoreFile]:
    """Results of evaluations; statistics.json after the vectors that it refers to."""
    documents = []
    for name in sorted(storage.list(EVALUATION)):
        if name.startswith("."):
            continue
        try:
            path = file_in_store(f"{EVALUATION}/{name}")
        except ValueError as error:
            raise StoreError(f"{storage.root}: {error}: rename or delete it.") from error
        if not re.fullmatch(VECTORS_FILE, path):
            documents.append(path)
            continue
        vectors = hashed(storage, path)  # as large as 256 bytes per record
        if not path.endswith(f".{vectors.hash[:16]}.npy"):
            raise StoreError(
                f"{storage.root}/{path} is damaged: run `latentmill evaluate {storage.root} --only "
                "statistics` to write it again."
            )
        yield vectors
    for path in documents:
        yield hashed(storage, path, replaced=True)


def hashed(
    storage: Storage, path: str, expected: str | None = None, *, replaced: bool = False
) -> StoreFile:
    """Read a file for its size and hash, and check the hash if it is known."""
    with storage.open(path) as file:
        digest = hash_of(file)
        size = file.tell()
    if expected is not None and digest != expected:
        raise damaged(storage, path)
    return StoreFile(path, size, digest, replaced)


def _units(storage: Storage, store: LatentStore) -> Iterator[UnitFiles]:
    """The files of all units, from the sealed commits."""
    seal_hash, listed = SealHash(), {shard.path: shard for shard in store.info.shards}
    wanted = [(unit.name, store.info.revisions.get(unit.name, 0)) for unit in store.plan.units]
    commits = map_in_threads(
        lambda unit: _read_commit(storage, *unit), wanted, threads=READERS, prefetch=READERS
    )
    with contextlib.closing(commits):
        for commit, file in commits:
            seal_hash.add(commit)
            shard = None
            if commit.shard is not None and commit.hash is not None:
                entry = listed.pop(commit.shard, None)
                if entry is None or (entry.bytes, entry.hash) != (commit.bytes, commit.hash):
                    raise damaged(storage, file.path)
                shard = StoreFile(commit.shard, commit.bytes, commit.hash)
            yield UnitFiles(commit.unit, commit.revision, shard, file)
    sealed = store.info.seal  # format version 1 does not have it
    if listed or (sealed is not None and seal_hash.hexdigest() != sealed):
        raise damaged(storage, DATASET_PATH)


def _read_commit(storage: Storage, unit: str, revision: int) -> tuple[Commit, StoreFile]:
    path = commit_path(unit, revision)
    data = storage.read(path)
    hint = "restore it from a copy of the store"
    commit = parse_document(Commit, data, f"{storage.root}/{path}", hint)
    if (commit.unit, commit.revision) != (unit, revision):
        raise damaged(storage, path)
    return commit, StoreFile(path, len(data), xxhash.xxh3_128_hexdigest(data))
