"""Removing superseded revisions and shards that were never committed."""

from __future__ import annotations

import re

from latentmill.plan import BATCH_PATH, PLAN, PLAN_PATH, Plan
from latentmill.storage.remote import open_filesystem, protocol_of, storage_errors
from latentmill.storage.storage import Storage
from latentmill.store.annotations import ANNOTATIONS
from latentmill.store.commit import committed_revisions
from latentmill.store.schema import (
    CARD_PATH,
    COMMITS,
    DATASET_PATH,
    INDEX_NAME,
    METADATA_NAME,
    ORIGIN_PATH,
    SHARDS,
    DatasetInfo,
    parse_name,
)
from latentmill.store.seal import read_seal

PLAN_FILE = re.compile(r"(?:items|units)(?:-(\d{4,}))?(?:\.(\d+))?\.parquet")

# Paths of the files that only the holder of the store's lock or lease writes. Without fields, which
# have their own, and evaluations, which need none.
WRITTEN = re.compile(
    "|".join(
        (
            INDEX_NAME,
            METADATA_NAME,
            *map(re.escape, (DATASET_PATH, CARD_PATH, ORIGIN_PATH, PLAN_PATH, BATCH_PATH)),
            f"{PLAN}/(?:{PLAN_FILE.pattern})",
            rf"{COMMITS}/\d+(?:\.r\d+)?\.json",
            rf"{SHARDS}/\d+(?:\.r\d+)?\.(?:parquet|tar)",
            rf"{ANNOTATIONS}/\d{{4,}}\.parquet",
        )
    )
)


def tidy(storage: Storage) -> None:
    """Remove leftovers of earlier runs. The caller has the lease and has not written yet.

    The revisions in the seal stay, even if a commit was deleted by hand, and so do the current
    revisions. In a bucket, another shard without a commit is removed only if a later revision is
    committed, because a paused worker of a dead run may still commit it. On a disk, no such worker
    can exist.
    """
    abort_uploads(storage)
    sealed = read_seal(storage)
    current = committed_revisions(storage)
    commits = storage.list(COMMITS)
    committed = {parse_name(name) for name in commits}
    in_seal = {} if sealed is None else {unit: sealed.revisions.get(unit, 0) for unit in current}
    if sealed is not None:
        committed |= {parse_name(shard.path.rpartition("/")[2]) for shard in sealed.shards}
    for folder, names in ((COMMITS, commits), (SHARDS, storage.list(SHARDS))):
        for name in names:
            if (parsed := parse_name(name)) is None:
                continue
            unit, revision = parsed
            superseded = revision < current.get(unit, 0) and revision != in_seal.get(unit)
            if superseded or (storage.local and parsed not in committed):
                storage.delete(f"{folder}/{name}")
    if sealed is not None:
        tidy_sealed(storage, sealed)


def tidy_sealed(storage: Storage, sealed: DatasetInfo) -> None:
    """Remove the indexes and metadata files that dataset.json does not list."""
    for name in storage.list(""):
        named = re.fullmatch(f"{INDEX_NAME}|{METADATA_NAME}", name)
        if named and name not in (sealed.index, sealed.metadata):
            storage.delete(name)


def abort_uploads(storage: Storage) -> None:
    """Abort S3 uploads that killed processes left open, because their parts are billed.

    The caller has the lease, so no other process uploads files of `WRITTEN`. Other uploads stay: an
    `add` or another program may be running. If listing uploads is not allowed, all stay.
    """
    if protocol_of(storage.root) not in ("s3", "s3a"):
        return
    fs, path = open_filesystem(storage.root)
    bucket, _, key = path.partition("/")
    try:
        prefix = f"{key.rstrip('/')}/" if key else ""
        after: dict[str, str] = {}
        while True:
            page = fs.call_s3("list_multipart_uploads", Bucket=bucket, Prefix=prefix, **after)
            for upload in page.get("Uploads", []):
                if WRITTEN.fullmatch(upload["Key"].removeprefix(prefix)):
                    name = {"Key": upload["Key"], "UploadId": upload["UploadId"]}
                    fs.call_s3("abort_multipart_upload", Bucket=bucket, **name)
            if not page.get("IsTruncated"):
                return
            after = {f"{name}Marker": page[f"Next{name}Marker"] for name in ("Key", "UploadId")}
    except storage_errors():  # clients are imported by their first call
        return


def remove_unfinished(storage: Storage) -> None:
    """Remove uncommitted shards of this run of which a later revision is committed."""
    current = committed_revisions(storage)
    committed = {parse_name(name) for name in storage.list(COMMITS)}
    for name in storage.list(SHARDS):
        parsed = parse_name(name)
        if parsed and parsed not in committed and parsed[1] < current.get(parsed[0], 0):
            storage.delete(f"{SHARDS}/{name}")


def tidy_plan(storage: Storage, plan: Plan | None) -> None:
    """Remove files of items and units that plan.json does not list.

    In a bucket, only those that a paused planner can no longer add to plan.json. Without a plan, a
    batch size is that of another model, and is removed, too.
    """
    parts = () if plan is None else plan.parts
    listed = {path for part in parts for path in (part.items_file, part.units_file)}
    for name in storage.list(PLAN):
        if plan is None and f"{PLAN}/{name}" == BATCH_PATH:
            storage.delete(BATCH_PATH)
        match = PLAN_FILE.fullmatch(name)
        if match is None or f"{PLAN}/{name}" in listed:
            continue
        number, revision = int(match[1] or 0), int(match[2] or 0)
        superseded = number < len(parts) and revision < parts[number].revision
        if storage.local or superseded:
            storage.delete(f"{PLAN}/{name}")
