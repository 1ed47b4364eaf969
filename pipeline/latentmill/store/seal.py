"""Sealing a store: writing the index, the metadata, the card and dataset.json from the commits.

dataset.json is the seal. It lists the index and the shards, which are never overwritten. It is
replaced last and atomically, so readers see either the old seal or the new one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping

import numpy as np
import pyarrow as pa
import xxhash

from latentmill import __version__
from latentmill.encoding.fingerprint import fingerprint
from latentmill.errors import StorageError, StoreError, restore_hint
from latentmill.plan import Plan
from latentmill.record import FloatArray
from latentmill.storage.storage import Storage
from latentmill.store.annotations import (
    Annotations,
    found_annotation,
    open_annotations,
    write_annotations,
)
from latentmill.store.card import write_card
from latentmill.store.commit import SealHash, iter_commits
from latentmill.store.entries import AnnotationEntry, ShardEntry
from latentmill.store.index import Index, to_batch
from latentmill.store.metadata import has_hash, publish_metadata
from latentmill.store.npy import npy_bytes, parse_npy
from latentmill.store.schema import (
    CARD_PATH,
    DATASET_PATH,
    ORIGIN_PATH,
    Commit,
    DatasetInfo,
    parse_document,
)
from latentmill.store.statistics import ChannelStatistics

# Called with the storage, the last seal and the units' current revisions; returns the new
# annotations, or None to keep the old ones.
Amended = Callable[[Storage, DatasetInfo, Mapping[str, int]], pa.Table | None]

VIEW_FIELDS = {"bases", "left_out", "left_out_file"}  # of dataset.json


def dataset_info(plan: Plan, commits: Iterable[Commit]) -> DatasetInfo:
    """Build the contents of dataset.json from the plan and the commits, in one pass."""
    document = plan.fingerprint
    statistics = ChannelStatistics.empty(document["model"]["latent_channels"])
    counts: Counter[str] = Counter()
    seconds = 0.0
    shards: list[ShardEntry] = []
    seal_hash, revisions = SealHash(), {}
    for commit in commits:
        seal_hash.add(commit)
        if commit.revision:
            revisions[commit.unit] = commit.revision
        counts.update(item.status for item in commit.items)
        seconds += commit.audio_seconds
        if entry := commit.statistics:
            if len(entry.mean) != len(statistics.mean):
                raise StoreError(
                    f"The commit of unit {commit.unit} has {len(entry.mean)} channels instead of "
                    f"{len(statistics.mean)}: {restore_hint('it')}."
                )
            part = ChannelStatistics(entry.frames, np.array(entry.mean), np.array(entry.m2))
            statistics = statistics.merge(part)
        if commit.shard is not None and commit.hash is not None:
            shards.append(
                ShardEntry(
                    path=commit.shard, rows=commit.rows, bytes=commit.bytes, hash=commit.hash
                )
            )
    chunking = document["chunking"]
    return DatasetInfo(
        latentmill_version=__version__,
        format=plan.format,
        layout="chunks" if chunking["stitch"] == "none" else "time-major",
        dtype=document["settings"]["dtype"],
        model={
            **document["model"],
            "asked": plan.model,
            "options": plan.model_options,
            "asked_channels": plan.channels,
            "provenance": plan.provenance,
        },
        chunking=chunking,
        fingerprint=fingerprint(document),
        source=plan.source,
        items=plan.num_items,
        encoded=counts["encoded"],
        skipped=counts["skipped"],
        failed=counts["failed"],
        hours=round(seconds / 3600, 6),
        frames=statistics.frames,
        mean=statistics.mean.tolist(),
        std=statistics.std.tolist(),
        origin=ORIGIN_PATH,
        shards=shards,
        seal=seal_hash.hexdigest(),
        revisions=revisions,
        field=plan.field,
    )


def seal(
    storage: Storage,
    plan: Plan,
    *,
    shards: Storage | None = None,
    amended: Amended = lambda *_: None,
) -> DatasetInfo:
    """Write index, metadata, card and dataset.json from the commits of the plan's units.

    Reads the fields of all records from the shards, for the metadata. `shards` is where these are,
    if they are not in `storage`. The store's annotations stay, or are replaced by those that
    `amended` returns, in the same step as the records.
    """
    names = {unit.name for unit in plan.units}
    batches = []

    def commits() -> Iterator[Commit]:
        for commit in iter_commits(storage):
            if commit.unit in names:
                batches.append(to_batch(commit))
                yield commit

    info = dataset_info(plan, commits())
    index = Index.from_batches(batches)
    batches.clear()
    data = index.to_bytes()
    digest = xxhash.xxh3_128_hexdigest(data)
    name = f"index.{digest[:16]}.arrow"
    storage.write(name, data)  # named by its hash: an existing file is equal or damaged
    sealed = read_seal(storage)
    annotation, annotations = current_annotations(storage, sealed)
    table = None if sealed is None else amended(storage, sealed, info.revisions)
    if table is not None:
        annotation, annotations = write_annotations(storage, annotation, table)
    metadata, metadata_hash = publish_metadata(storage, index, annotations, shards)
    info = info.model_copy(
        update={
            "index": name,
            "index_hash": digest,
            "metadata": metadata,
            "metadata_hash": metadata_hash,
            "annotation": annotation,
        }
    )
    write_card(storage, info)
    write_seal(storage, info)
    return info


def current_annotations(
    storage: Storage, sealed: DatasetInfo | None
) -> tuple[AnnotationEntry | None, Annotations | None]:
    """The annotations that the next seal will have; StoreError if they are missing or damaged.

    `sealed` is the content of dataset.json.
    """
    annotation = found_annotation(storage) if sealed is None else sealed.annotation
    return annotation, None if annotation is None else open_annotations(storage, annotation)


def write_seal(storage: Storage, info: DatasetInfo) -> None:
    """Replace dataset.json. Fields that only some stores have are not written for the others.

    Earlier versions refuse stores of format version 3, and would call such fields damaged.
    """
    version = 3 if info.bases or info.annotation else 2
    unused = {"seams", "linearity"} | ({"annotation"} if info.annotation is None else set())
    unused |= {"field", "base_seal"} if info.field is None else set()
    unused |= set() if info.bases else VIEW_FIELDS
    written = info.model_copy(update={"format_version": version})
    storage.write(DATASET_PATH, written.model_dump_json(indent=2, exclude=unused).encode())


def read_seal(storage: Storage) -> DatasetInfo | None:
    """Read dataset.json; None if it does not exist.

    Raises StoreError if it is damaged or has an unsupported format version.
    """
    data = storage.read_if_exists(DATASET_PATH)
    if data is None:
        return None
    where = f"{storage.root}/{DATASET_PATH}"
    return parse_document(DatasetInfo, data, where, "delete it and run again to seal the store")


def current_seal(storage: Storage, seal_hash: str) -> DatasetInfo | None:
    """Read dataset.json if it is up to date: its hash matches and the files it needs are intact.

    `seal_hash` is the hash over the store's commits; see `SealHash`. Returns None otherwise, also
    for the seal of an earlier version, which has no metadata.
    """
    info = read_seal(storage)
    if info is None or info.seal != seal_hash or not storage.exists(CARD_PATH):
        return None
    index = storage.read_if_exists(info.index)
    if index is None or xxhash.xxh3_128_hexdigest(index) != info.index_hash:
        return None
    if info.metadata is None or not has_hash(storage, info.metadata, info.metadata_hash):
        return None
    return info


def check_fingerprint(url: str, info: DatasetInfo, read: str) -> None:
    """Raise StoreError if a seal has another fingerprint than the one that is being read.

    Runs never change it. A field has another one if it was dropped and added again.
    """
    if info.fingerprint != read:
        raise StoreError(
            f"{url} was replaced by another store or field, with other settings, while it was "
            "being read: open it again."
        )


def write_origin(storage: Storage, origin: FloatArray) -> None:
    """Store E(0) of one chunk, `[D, Z]`."""
    storage.write(ORIGIN_PATH, npy_bytes(origin))


def read_origin(storage: Storage, channels: int | None = None) -> FloatArray:
    """Read E(0) of one chunk, `[D, Z]`; StorageError if it is missing or damaged.

    With `channels`, another D is damage, too.
    """
    try:
        data = storage.read(ORIGIN_PATH)
    except StorageError as error:
        if not isinstance(error.__cause__, FileNotFoundError):
            raise
        raise StorageError(
            f"{storage.root}/{ORIGIN_PATH} is missing: restore it from a copy of the store, or run "
            "the same encode command again."
        ) from error.__cause__
    try:
        origin: FloatArray = parse_npy(data)
        if origin.ndim != 2 or channels not in (None, len(origin)):
            raise ValueError(f"{origin.shape} is not [D, Z]")
    except ValueError as error:
        raise StorageError(
            f"{storage.root}/{ORIGIN_PATH} is damaged: restore it from a copy of the store."
        ) from error
    return origin
