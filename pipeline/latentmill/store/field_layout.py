"""The fields of a store: names and places. The field NAME is a store in `fields/NAME/`."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from latentmill.errors import ConfigError, FieldBehindWarning, StoreError
from latentmill.plan import PLAN_PATH, Plan, load
from latentmill.storage.remote import is_web
from latentmill.storage.storage import Storage
from latentmill.store.describe import warn_incomplete
from latentmill.store.schema import COMMITS, DATASET_PATH, SHARDS, DatasetInfo, parse_name
from latentmill.store.seal import read_seal

if TYPE_CHECKING:
    from latentmill.store.store import LatentStore

FIELDS = "fields"
DROPPED = ".dropped"  # ending of the file beside a field's folder that `drop` leaves
_MAX_DIGITS = 9  # of a revision
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")


def field_url(base: str, name: str) -> str:
    """The folder or URL of a field, which may not exist. ConfigError if the name is not valid."""
    if not _NAME.fullmatch(name):
        raise ConfigError(
            f"invalid field name {name!r}: use up to 64 letters, digits, - and _, and start with a "
            "letter or a digit."
        )
    return f"{base.rstrip('/')}/{FIELDS}/{name}"


def base_url(field: str) -> str:
    """The folder or URL of the base store of a field."""
    return field.rstrip("/").rpartition("/")[0].rpartition("/")[0]


def field_storage(base: Storage, name: str) -> Storage:
    """The folder of a field, which may not exist.

    Raises:
        ConfigError: The name is not valid.
        StoreError: It is a link, which could lead to files outside of the store.
    """
    url = field_url(base.root, name)
    if base.local:
        for folder in (Path(base.full(FIELDS)), Path(url)):
            if folder.is_symlink():
                raise StoreError(f"{folder} is a link: replace it by a folder.")
    return Storage(url)


def first_revision(field: str) -> int:
    """The revision from which the shards of a field are numbered, by its folder or URL.

    If the field was dropped and is added again, it is higher than those of the dropped shards:
    readers may still have these open or cached, by their names.
    """
    path = f"{FIELDS}/{field.rstrip('/').rpartition('/')[2]}{DROPPED}"
    base = Storage(base_url(field))
    if (data := base.read_if_exists(path)) is None:
        return 0
    if not data.isdigit() or len(data) > _MAX_DIGITS:
        raise StoreError(
            f"{base.named(path)} is damaged: stop what reads the field, and delete this file."
        )
    return int(data)


def field_names(base: Storage) -> list[str]:
    """Names of the folders in `fields/`, sorted; also of fields that are not complete.

    Folders that are links or do not have the name of a field are left out. On web servers, whose
    folders cannot be listed reliably, it finds none.
    """
    if is_web(base.root):
        return []
    found = [name for name in base.folders(FIELDS) if _NAME.fullmatch(name)]
    if not base.local:
        return found
    folder = Path(base.full(FIELDS))
    return [name for name in found if not (folder.is_symlink() or (folder / name).is_symlink())]


def base_state(base: DatasetInfo | None, source: str) -> str:
    """What dataset.json of a store tells about the inputs of a field from `source`.

    That is the hash over the commits, and for a text with annotated values also that of the
    annotations; a change of other annotated names changes it, too. Empty if the store is not
    sealed. A field that was compared with another state may be behind.
    """
    if base is None or base.seal is None:
        return ""
    entry, name = base.annotation, source.removeprefix("metadata:")
    if entry is None or name == source or name not in entry.names:
        return base.seal
    return f"{base.seal}+{entry.hashes[-1]}"


def warn_if_behind(url: str, base: DatasetInfo | None, field: LatentStore) -> None:
    """Warn if a field is not complete, or the store has changed since its values were computed.

    Compares what is in memory already. Fields of earlier versions are not compared. `base` is None
    if the store is not sealed.
    """
    warn_incomplete(field)
    entry = field.info.field if field.sealed else None
    if entry is None or base is None or field.info.base_seal is None:
        return
    if field.info.base_seal != base_state(base, entry.source):
        warnings.warn(
            f"field {entry.name!r} of {url} may be out of date, because the store has changed "
            f"since: `latentmill status {url}` shows what is behind, and the `latentmill add` "
            "command that added the field brings it up to date.",
            FieldBehindWarning,
            stacklevel=2,
        )


def base_plan(base: Storage) -> Plan:
    """The plan of a store that can have fields. StoreError if it has none, is a view or a field."""
    sealed = read_seal(base)
    if sealed is not None and sealed.bases:
        raise StoreError(
            f"{base.root} is a view, whose fields are those of its base stores: use "
            f"{', '.join(entry.url for entry in sealed.bases)}."
        )
    plan = load(base)
    if plan is None:
        raise StoreError(
            f"{base.root} is not a latentmill store, or its run is still planning it: check the "
            "path, or try again later."
        )
    if plan.field is not None:
        raise StoreError(
            f"{base.root} is a field, and a field cannot have fields: use {base_url(base.root)}."
        )
    return plan


def is_field(storage: Storage) -> bool:
    """Whether the folder of a field contains a plan or a seal."""
    return storage.exists(DATASET_PATH) or storage.exists(PLAN_PATH)


def has_parts(storage: Storage) -> bool:
    """Whether the folder of a field contains a field, or what is left of one.

    Otherwise it has at most files of users, or the lock of an `add` that has not written its plan.
    """
    folders = (COMMITS, SHARDS)
    return is_field(storage) or any(
        parse_name(name) for folder in folders for name in storage.list(folder)
    )


def existing_field(base: Storage, name: str) -> str:
    """The folder or URL of a field.

    Raises:
        ConfigError: The name is not valid.
        StoreError: The store has no such field.
    """
    storage = field_storage(base, name)
    if is_field(storage):
        return storage.root
    names = field_names(base)
    have = f"its fields are {', '.join(names)}" if names else "it has no fields"
    raise StoreError(
        f"{base.root} has no field {name!r}, {have}: add it with `latentmill add {base.root} "
        f"--field {name} --model MODEL`."
    )
