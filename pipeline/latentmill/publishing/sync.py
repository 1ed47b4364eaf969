"""Copying a store to another storage: only what is missing, checked, dataset.json last."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from latentmill.engine.lock import only_run
from latentmill.errors import ConfigError, StorageError
from latentmill.publishing.contents import StoreFile, StoreFiles, changed, contents_of
from latentmill.publishing.difference import CopyDifference, difference
from latentmill.publishing.transfer import JOBS, Transfer, check, check_jobs, download, read_checked
from latentmill.storage.remote import protocol_of, was_removed
from latentmill.storage.storage import Storage
from latentmill.store.commit import write_new
from latentmill.store.field_layout import FIELDS, field_names, field_storage, is_field
from latentmill.store.schema import DATASET_PATH
from latentmill.store.seal import read_seal
from latentmill.store.store import LatentStore
from latentmill.store.tidy import abort_uploads
from latentmill.text.log import get_logger

_log = get_logger("publishing")


@dataclass(frozen=True)
class SyncSummary:
    """Result of copying a store.

    Attributes:
        source: The store.
        dest: The copy.
        copied: Paths of the files that were copied, or would be.
        bytes: Their size.
        kept: Number of files that the copy had already.
        removed: Paths of superseded files that were removed, or would be.
        dry_run: Whether nothing was written.
    """

    source: str
    dest: str
    copied: tuple[str, ...]
    bytes: int
    kept: int
    removed: tuple[str, ...]
    dry_run: bool = False


def sync(
    source: str | os.PathLike[str],
    dest: str | os.PathLike[str],
    *,
    jobs: int = JOBS,
    dry_run: bool = False,
) -> SyncSummary:
    """Copy a complete store to another folder or bucket, or update an earlier copy of it.

    Copies only what is missing or differs. Each file is checked against its hash, and dataset.json
    is written last. If it is interrupted, the same call continues. Complete fields are copied after
    the store; fields that the store no longer has stay in the copy. If a field cannot be copied,
    the others are, before the error is raised.

    Args:
        source: The store: a folder or fsspec URL.
        dest: A new folder or URL, or an earlier copy of this store.
        jobs: Number of files copied at the same time; each needs 8 MiB of memory. Between two
            buckets, each file is in the folder for temporary files (TMPDIR) while it is copied.
        dry_run: Report what would be copied, and write nothing.

    Raises:
        StoreError: The source is incomplete, damaged or a view, or another run writes to `dest`.
        ConfigError: `dest` has something else than a copy of this store, or of one of its fields.
        StorageError: Reading or writing failed.
    """
    check_jobs(jobs)
    target, store = Storage(os.fspath(dest)), Storage(os.fspath(source))
    _check_destination(os.fspath(source), target)
    summary = _synced(store.root, target, jobs, dry_run=dry_run)
    errors: list[ConfigError] = []
    for name in field_names(store):
        field = field_storage(store, name)
        if not is_field(field) or not LatentStore(field.root).complete:
            _log.warning("%s is not complete and was not copied: finish or drop it", field.root)
            continue
        try:
            copied = _synced(field.root, field_storage(target, name), jobs, dry_run=dry_run)
        except ConfigError as error:
            errors.append(error)
            continue
        summary = _with_field(summary, copied, name)
    for other in errors[1:]:
        _log.error("%s", other)
    if errors:
        raise errors[0]
    return summary


def _with_field(summary: SyncSummary, copied: SyncSummary, name: str) -> SyncSummary:
    def inside(paths: Sequence[str]) -> tuple[str, ...]:
        return tuple(f"{FIELDS}/{name}/{path}" for path in paths)

    return replace(
        summary,
        copied=summary.copied + inside(copied.copied),
        bytes=summary.bytes + copied.bytes,
        kept=summary.kept + copied.kept,
        removed=summary.removed + inside(copied.removed),
    )


def _synced(source: str, target: Storage, jobs: int, *, dry_run: bool) -> SyncSummary:
    """Copy a store without its fields."""
    contents = contents_of(source)
    found = difference(contents, target)
    if not dry_run and (found.seal or any(found.files()) or found.remove):
        with only_run(target) as hold:
            target = hold.storage
            target.clear_scratch()
            abort_uploads(target)
            found = difference(contents, target)
            _write(contents, found, target, jobs)
    seal = StoreFile(DATASET_PATH, len(contents.seal), "")
    files = [*found.files(), *([seal] if found.seal else [])]
    return SyncSummary(
        source=contents.storage.root,
        dest=target.root,
        copied=tuple(file.path for file in files),
        bytes=sum(file.size for file in files),
        kept=found.kept,
        removed=found.remove,
        dry_run=dry_run,
    )


def _check_destination(source: str, dest: Storage) -> None:
    dest.refuse_read_only()
    if protocol_of(dest.root) == "hf":
        raise ConfigError(
            f"sync would make one commit of {dest.root} per file: use `latentmill push {source} "
            f"{dest.root}`."
        )
    store = Storage(source)
    inside, outside = (f"{storage.real_root}/" for storage in (dest, store))
    if inside.startswith(outside) or outside.startswith(inside):
        raise ConfigError(f"{dest.root} and {store.root} overlap: use another destination.")


def _write(contents: StoreFiles, found: CopyDifference, dest: Storage, jobs: int) -> None:
    """Write the difference. The units are copied in parallel, each shard before its commit."""
    source = contents.storage
    transfer = Transfer("copying", sum(file.size for file in found.files()))
    try:
        with transfer.displayed():
            for file in found.first:
                _copy(source, dest, file, transfer)
            transfer.run([partial(_unit, source, dest, u, transfer) for u in found.units], jobs)
            for file in found.last:
                _copy(source, dest, file, transfer)
    except StorageError as error:
        if was_removed(error.__cause__) and read_seal(source) != contents.info:
            raise changed(source) from error
        raise
    if found.seal:
        dest.write(DATASET_PATH, contents.seal)
    for path in found.remove:
        dest.delete(path)


def _unit(source: Storage, dest: Storage, unit: Sequence[StoreFile], transfer: Transfer) -> None:
    for file in unit:
        _copy(source, dest, file, transfer)


def _copy(source: Storage, dest: Storage, file: StoreFile, transfer: Transfer) -> None:
    """Copy a file. A file with its name that the destination has is another one: replace it."""
    if file.replaced:
        dest.write(file.path, read_checked(source, file, transfer))
        return
    if source.local and not dest.local:
        check(source, file, transfer)
        path = Path(source.full(file.path))
        write_new(dest, file.path, partial(dest.publish, path, file.path))
        return
    with dest.scratch_file(file.path) as temporary:
        download(source, file, temporary, transfer)
        write_new(dest, file.path, partial(dest.publish, temporary, file.path))
