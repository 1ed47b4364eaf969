"""Adds metadata from a table to the records of a sealed store, beside its shards."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from latentmill.curation.annotation_table import EMPTY, merged, read_table, without
from latentmill.encoding.fingerprint import version_difference
from latentmill.engine.lock import only_run
from latentmill.errors import ConfigError, SourceError, StoreError
from latentmill.storage.storage import Storage
from latentmill.store.annotations import Annotations, open_annotations, write_annotations
from latentmill.store.metadata import PREFIX, publish_metadata
from latentmill.store.seal import write_seal
from latentmill.store.store import LatentStore
from latentmill.store.tidy import tidy_sealed
from latentmill.text.log import get_logger

MAX_LISTED = 20

_log = get_logger("curation")


@dataclass(frozen=True)
class AnnotateSummary:
    """Result of a change of a store's annotations.

    Attributes:
        store: Root of the store.
        version: Version of the annotations after the change.
        changed: Whether there is a new version; False if the store already had these values.
        names: Names of all annotated values.
        records: Number of records that have annotated values.
        matched: Number of keys in the file that the store has.
        unknown: Number of keys in the file that the store does not have.
        unknown_keys: The first of them.
        ignored: Columns of the file with the name of a stored field, which cannot be changed.
    """

    store: str
    version: int
    changed: bool
    names: tuple[str, ...]
    records: int
    matched: int = 0
    unknown: int = 0
    unknown_keys: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()


def annotate(
    store: str | os.PathLike[str] | LatentStore,
    file: str | os.PathLike[str] | None = None,
    *,
    key_column: str | None = None,
    remove: Sequence[str] = (),
) -> AnnotateSummary:
    """Add or replace metadata of records, without encoding anything again.

    Writes a new version of the store's annotations; `revert_annotations` returns to an earlier one.
    Annotated values replace stored ones of the same name. Empty cells change nothing.

    Args:
        store: A complete store, or a view, whose bases do not change.
        file: Path or URL of a CSV, TSV, JSONL or Parquet file with a column of keys.
        key_column: Name of that column; None for `key` or `id`.
        remove: Annotated names whose values are removed first.

    Raises:
        SourceError: The file cannot be read, has a key twice, or has no key of the store.
        StoreError: The store is not complete, or another run is writing to it.
        ConfigError: A name cannot be annotated, or a name to remove is not annotated.
    """
    if file is None and not remove:
        raise ConfigError("annotate needs a file with metadata, or names to remove.")
    new = None if file is None else read_table(os.fspath(file), key_column)
    with _editing(store, _refuse_incomplete) as (storage, current):
        table = EMPTY if current.annotations is None else current.annotations.table
        names = table.column_names[1:]
        if missing := [name for name in remove if name not in names]:
            raise ConfigError(
                f"{current.url} has no annotated values named {missing[0]}: its annotated names "
                f"are {', '.join(names) or 'none'}."
            )
        table = without(table, remove)
        if new is None:
            return publish(storage, current, table, changed=True)
        known = pc.is_in(new.table["key"], value_set=current.index.key_array())
        unknown = new.table["key"].filter(pc.invert(known)).sort()
        matched = len(known) - len(unknown)
        if not matched:
            raise SourceError(
                f"{file} has no key of {current.url} (its first key is {unknown[0]}): check its "
                "keys and --key-column."
            )
        annotations = Annotations(merged(table, new.table.filter(known)))
        changed = not annotations.same_as(current.annotations)
        return dataclasses.replace(
            publish(storage, current, annotations.table, changed=changed),
            matched=matched,
            unknown=len(unknown),
            unknown_keys=tuple(unknown.slice(0, MAX_LISTED).to_pylist()),
            ignored=new.ignored,
        )


def revert_annotations(
    store: str | os.PathLike[str] | LatentStore, version: int | None = None
) -> AnnotateSummary:
    """Return to an earlier version of a store's annotations, by writing it as a new version.

    Args:
        store: A store with annotations. Its run may be unfinished if it was complete before.
        version: The version to return to; 0 is without annotations. None undoes the last change.

    Raises:
        StoreError: The store has no annotations, or another run writes to it.
        ConfigError: There is no such version.
    """
    with _editing(store, _refuse_unsealed) as (storage, current):
        entry = current.info.annotation
        if entry is None:
            raise StoreError(f"{current.url} has no annotations: there is nothing to revert.")
        wanted = entry.version - 1 if version is None else version
        if not 0 <= wanted <= entry.version:
            raise ConfigError(
                f"{current.url} has no version {wanted} of its annotations: use 0 to "
                f"{entry.version}."
            )
        table = EMPTY if wanted == 0 else open_annotations(storage, entry, wanted).table
        # Not by the current values, which may be damaged.
        same = entry.hashes[wanted - 1] == entry.hashes[-1] if wanted else not entry.records
        if same:
            try:
                open_annotations(storage, entry)
            except StoreError:  # the newest file is missing or damaged: written again
                same = False
        return publish(storage, current, table, changed=not same)


@contextlib.contextmanager
def _editing(
    store: str | os.PathLike[str] | LatentStore,
    refuse: Callable[[LatentStore], None],
) -> Iterator[tuple[Storage, LatentStore]]:
    """Hold the lock of a store; `store` itself, if it is open, is then read again.

    `refuse` raises StoreError if the store cannot be changed.
    """
    opened = store if isinstance(store, LatentStore) else LatentStore(store)
    refuse(opened)  # the lock would write a file
    with only_run(Storage(opened.url)) as hold:
        current = LatentStore(opened.url)  # another run may have sealed it meanwhile
        refuse(current)
        storage = hold.storage
        storage.clear_scratch()
        tidy_sealed(storage, current.info)
        yield storage if current.bases is None else current.bases.over(storage), current
    opened.reload()


def _refuse_unsealed(store: LatentStore) -> None:
    if not store.sealed:
        raise _incomplete(store)


def _refuse_incomplete(store: LatentStore) -> None:
    if not store.complete:
        raise _incomplete(store)
    if store.info.metadata is None:
        advice = "run the same encode command again, then annotate it"
        if version_difference(store.plan.fingerprint):  # which that command refuses
            advice = f"copy it with `latentmill select {store.url} NEW --copy`, then annotate NEW"
        raise StoreError(f"{store.url} was sealed by an earlier version: {advice}.")


def _incomplete(store: LatentStore) -> StoreError:
    return StoreError(
        f"{store.url} is not complete: finish the run that encodes it, then annotate it."
    )


def publish(
    storage: Storage,
    store: LatentStore,
    table: pa.Table,
    *,
    changed: bool,
    refreshed: bool = False,
) -> AnnotateSummary:
    """Write a new version of the annotations and the metadata file, then replace dataset.json.

    `refreshed` marks a version whose new values come from the source.
    """
    info = store.info
    entry, annotations = info.annotation, Annotations(table)
    if changed:
        entry, annotations = write_annotations(storage, entry, table, refreshed=refreshed)
        metadata, digest = publish_metadata(storage, store.index, annotations)
        update = {"metadata": metadata, "metadata_hash": digest, "annotation": entry}
        write_seal(storage, info.model_copy(update=update))
        storage.clear_scratch()
        known = [] if info.annotation is None else info.annotation.names
        _warn_of_case(storage, metadata, set(annotations.kinds).difference(known))
    return AnnotateSummary(
        store=storage.root,
        version=0 if entry is None else entry.version,
        changed=changed,
        names=tuple(annotations.kinds),
        records=len(annotations),
    )


def _warn_of_case(storage: Storage, metadata: str, new: set[str]) -> None:
    """Warn of new names that differ from others only in case, which SQL ignores."""
    with storage.open(metadata) as file:
        columns = pq.read_schema(file).names
    spellings = defaultdict(list)
    for column in columns:
        if column.startswith(PREFIX):
            name = column.removeprefix(PREFIX)
            spellings[name.encode().lower()].append(name)  # of ASCII letters, as DuckDB does
    for names in spellings.values():
        if len(names) > 1 and new.intersection(names):
            _log.warning(
                "%s: the names %s differ only in case, which SQL ignores: `query` "
                "renames the columns of all but the first.",
                storage.root,
                " and ".join(names),
            )
