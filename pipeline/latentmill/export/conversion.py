"""Export of a store to a store of the other shard format."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Mapping
from pathlib import Path

from latentmill.engine.lease import LEASE_PATH
from latentmill.engine.lock import LOCK_PATH, only_run
from latentmill.errors import ConfigError
from latentmill.plan import PLAN, Plan, copy, load
from latentmill.record import Outcome, ShardFormat
from latentmill.storage import scratch
from latentmill.storage.storage import Storage
from latentmill.store.commit import (
    committed_revisions,
    iter_commits,
    next_revisions,
    read_commit,
    write_commit,
    write_unit,
)
from latentmill.store.index import entries
from latentmill.store.measurement import NAMES, current_result, write_measurement
from latentmill.store.prefetch import prefetched
from latentmill.store.results import StoreStatistics
from latentmill.store.schema import COMMITS, SHARDS, Commit
from latentmill.store.seal import read_origin, seal, write_origin
from latentmill.store.store import LatentStore
from latentmill.store.tidy import remove_unfinished, tidy, tidy_plan


def convert(
    store: LatentStore, storage: Storage, format_name: ShardFormat
) -> tuple[int, list[tuple[str, str]]]:
    """Export to a store of the other format, unit by unit, with the same plan and fingerprint.

    An earlier export of the store is updated: units whose records have not changed are kept.
    Returns the number of records, and the keys that the format cannot contain with the reasons.
    """
    plan = dataclasses.replace(store.plan, format=format_name)
    source = Storage(store.url)
    if load(storage) is None:  # checked before the lock, which writes a file
        refuse_unless_empty(storage)
    with only_run(storage) as hold:
        storage = hold.storage
        _follow_plan(storage, plan, source)
        tidy_plan(storage, plan)
        tidy(storage)
        storage.clear_scratch()
        write_origin(storage, read_origin(source))
        _copy_units(store, storage, plan)
        sealed = seal(storage, plan)
        remove_unfinished(storage)
        for name in NAMES.values():
            if (result := current_result(source, store.info, name)) is not None:
                if isinstance(result, StoreStatistics):  # the file of vectors is not copied
                    result = result.model_copy(update={"vectors": None})
                write_measurement(storage, sealed, result)
    new_failures = [
        (item.key, item.reason or "")
        for commit in iter_commits(storage)
        for item in commit.items
        if item.status == "failed" and item.key in store
    ]
    return sealed.encoded, new_failures


def _follow_plan(storage: Storage, plan: Plan, source: Storage) -> None:
    """Copy the store's plan to a new export, or to an earlier one if the plan has changed.

    Raises `ConfigError` if the destination has anything else.
    """
    existing = load(storage)
    if existing is None:
        refuse_unless_empty(storage)
        copy(plan, source, storage)
        return
    names = ("source", "source_settings", "fingerprint", "format", "model", "model_options")
    if any(getattr(existing, name) != getattr(plan, name) for name in names):
        raise ConfigError(f"{storage.root} is another store: use an empty destination.")
    if existing != plan:
        copy(plan, source, storage)


def _copy_units(store: LatentStore, storage: Storage, plan: Plan) -> None:
    """Copy the records of all units that have not been copied or have changed since then."""
    info = {
        "model": plan.fingerprint["model"],
        "dtype": store.info.dtype,
        "layout": store.info.layout,
        "fingerprint": store.info.fingerprint,
    }
    annotation = store.info.annotation  # whose values are copied with the records
    suffix = "" if annotation is None else f"+{annotation.hashes[-1]}"
    done, revisions = committed_revisions(storage), next_revisions(storage)
    sizes = storage.list(SHARDS)
    for commit in iter_commits(Storage(store.url)):
        unit = commit.unit
        origin = None if commit.hash is None else f"{commit.hash}{suffix}"
        if unit in done and _is_copy(read_commit(storage, unit, done[unit]), commit, origin, sizes):
            continue
        new = write_unit(
            storage,
            unit,
            outcomes(store, commit),
            format_name=plan.format,
            fingerprint=commit.fingerprint,
            info=info,
            revision=revisions.get(unit, 0),
        )
        update = {"items_hash": commit.items_hash, "copied_from": origin}
        write_commit(storage, new.model_copy(update=update), commit.timings)


def _is_copy(
    existing: Commit, commit: Commit, origin: str | None, sizes: Mapping[str, int]
) -> bool:
    """Whether an export's commit has the same records and its shard is complete."""
    whole = existing.shard is None or sizes.get(existing.shard.rpartition("/")[2]) == existing.bytes
    same = (existing.copied_from, existing.items_hash) == (origin, commit.items_hash)
    pairs = itertools.zip_longest(existing.items, commit.items)
    return (
        whole
        and same
        and all(
            a is not None
            and b is not None
            and a.key == b.key
            # A record that the format cannot contain fails in the export only.
            and (b.status == "encoded" or (a.status, a.reason) == (b.status, b.reason))
            for a, b in pairs
        )
    )


def outcomes(store: LatentStore, commit: Commit) -> Iterator[Outcome]:
    """The outcomes of a unit's items, with the records in its shard."""
    records = map(store.read, prefetched(store, entries(commit)))
    for item in commit.items:
        record = next(records) if item.status == "encoded" else None
        yield Outcome(item.key, item.status, item.reason, record)


def refuse_unless_empty(storage: Storage) -> None:
    """Raise `ConfigError` unless a destination is empty.

    It may contain the files of an export that was interrupted before it wrote its plan.
    """
    if storage.local:
        used = bool(scratch.entries(Path(storage.root)) - {PLAN, LOCK_PATH})
    else:
        files = set(storage.list("")) - {LEASE_PATH}
        used = bool(files) or any(storage.list(folder) for folder in (SHARDS, COMMITS))
    if used:
        raise ConfigError(f"{storage.root} is not empty: use another destination.")
