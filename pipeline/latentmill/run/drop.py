"""Removing a field of a store; called by `latentmill drop`."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from latentmill.engine.lease import LEASE_PATH
from latentmill.engine.lock import LOCK_PATH, only_run
from latentmill.errors import StorageError, StoreError
from latentmill.plan import PLAN, PLAN_PATH
from latentmill.storage.scratch import SCRATCH
from latentmill.storage.storage import Storage, writing
from latentmill.store.annotations import ANNOTATIONS
from latentmill.store.field_layout import (
    DROPPED,
    FIELDS,
    field_names,
    field_storage,
    first_revision,
)
from latentmill.store.measurement import EVALUATION, NAMES
from latentmill.store.results import VECTORS_FILE
from latentmill.store.schema import COMMITS, DATASET_PATH, SHARDS, parse_name
from latentmill.store.tidy import WRITTEN

_FOLDERS = (PLAN, COMMITS, SHARDS, ANNOTATIONS, EVALUATION)
_WRITTEN = re.compile(
    rf"{WRITTEN.pattern}|{EVALUATION}/(?:{'|'.join(NAMES.values())})(?:-[a-z-]+)?\.json"
    rf"|{VECTORS_FILE}"
)


@dataclass(frozen=True)
class Dropped:
    """Result of `drop`.

    Attributes:
        store: Root of the store.
        field: Name of the field.
        files: Number of files that were removed.
        bytes: Their size.
        kept: Files in the folder of the field that latentmill did not write.
    """

    store: str
    field: str
    files: int
    bytes: int
    kept: tuple[str, ...] = ()


def drop(store: str | os.PathLike[str], *, field: str) -> Dropped:
    """Remove a field of a store. If it is interrupted, the same call finishes it.

    The seal of the field is removed first, so readers see either the whole field or none. What is
    left is `fields/FIELD.dropped`, with a number that shards of a later field of this name have.

    Args:
        store: Folder or fsspec URL of the store.
        field: Name of the field.

    Raises:
        StoreError: The store has no such field, or a run is writing to the field.
        StorageError: A file cannot be deleted.
    """
    base = Storage(os.fspath(store))
    folder = field_storage(base, field)
    if field not in (names := field_names(base)):
        has = f"its fields are {', '.join(names)}" if names else "it has no fields"
        raise StoreError(f"{base.root} has no field {field}: {has}.")
    folder.refuse_read_only()
    _refuse_links(folder)
    with only_run(folder) as hold:
        found = dict(_files(hold.storage))
        revisions = {path: revision for path in found if (revision := _revision(path)) is not None}
        # It shows the next `drop` that the number below is not written yet. Writing the number
        # first would fail on a full disk.
        last = max(revisions, key=revisions.__getitem__, default=None)
        for path in found:
            if path != last:
                hold.storage.delete(path)
        if last is not None:
            number = max(revisions[last] + 1, first_revision(folder.root))
            hold.check()
            _write_number(base, folder, f"{FIELDS}/{field}{DROPPED}", number)
            hold.storage.delete(last)
        folder.clear_scratch()
        if folder.local:
            _remove_if_empty(*(Path(folder.full(name)) for name in _FOLDERS))
    kept: tuple[str, ...] = ()
    if folder.local:
        root = Path(folder.root)
        _remove_if_empty(root, root.parent)
        left = (str(path.relative_to(root)) for path in root.rglob("*") if not path.is_dir())
        kept = tuple(sorted(path for path in left if path != LOCK_PATH))
    elif folder.exists(LEASE_PATH):  # which makes it a field that is not complete
        raise StorageError(
            f"{folder.full(LEASE_PATH)} could not be deleted: run the same command again."
        )
    return Dropped(base.root, field, len(found), sum(found.values()), kept)


def _files(storage: Storage) -> Iterator[tuple[str, int]]:
    """The files of a field with their sizes, in the order in which they are removed."""
    sizes = storage.list("")
    for folder in _FOLDERS:
        sizes |= {f"{folder}/{name}": size for name, size in storage.list(folder).items()}
    for path in (DATASET_PATH, PLAN_PATH):
        if path in sizes:
            yield path, sizes[path]
    for path, size in sizes.items():
        if _WRITTEN.fullmatch(path):
            yield path, size


def _write_number(base: Storage, folder: Storage, path: str, number: int) -> None:
    """Write it without a temporary file in the base: perhaps only `fields/` may be written to."""
    if not base.local:
        base.write(path, b"%d" % number)
        return
    target = Path(base.full(path))
    with folder.scratch_file(path) as temporary, writing(str(target)):
        with temporary.open("wb") as file:
            file.write(b"%d" % number)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(target)


def _revision(path: str) -> int | None:
    """The revision of a commit or shard; None for other files."""
    parsed = parse_name(path.rpartition("/")[2])
    return None if parsed is None else parsed[1]


def _refuse_links(folder: Storage) -> None:
    """Refuse a folder inside the field that is a link, because it may lead out of the store."""
    for name in (*_FOLDERS, SCRATCH) if folder.local else ():
        if Path(folder.full(name)).is_symlink():
            raise StoreError(f"{folder.full(name)} is a link: remove it first.")


def _remove_if_empty(*folders: Path) -> None:
    for path in folders:
        with contextlib.suppress(OSError):  # it has other files, or does not exist
            path.rmdir()
