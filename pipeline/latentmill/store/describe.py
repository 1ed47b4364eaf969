"""Description of a store for display, and the warning about an incomplete store."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING

from latentmill.errors import IncompleteStoreWarning, StorageError, StoreError
from latentmill.plan import PLAN_PATH
from latentmill.storage.remote import was_removed
from latentmill.store.commit import committed_revisions
from latentmill.store.index import Index, damaged_index, open_index
from latentmill.store.schema import DATASET_PATH, ORIGIN_PATH
from latentmill.text.printing import counted

if TYPE_CHECKING:
    from latentmill.store.schema import DatasetInfo
    from latentmill.store.store import LatentStore


def warn_incomplete(store: LatentStore) -> None:
    """Warn with counts if not all units of the plan are committed."""
    if store.sealed:
        return
    info, units = store.info, store.plan.units
    open_items = info.items - info.encoded - info.skipped - info.failed
    command = "encode" if info.field is None else "add"
    done = sum(unit.name in store.commits for unit in units)
    warnings.warn(
        f"{store.url} is not complete: {done} of {len(units)} units are committed, so "
        f"{open_items} of {info.items} items are missing. Run `latentmill {command}` again with "
        "the same options to complete it.",
        IncompleteStoreWarning,
        stacklevel=3,
    )


def read_index(store: LatentStore) -> Index:
    """The index file of a sealed store, or of the seal that has replaced it meanwhile."""
    try:
        index = open_index(store.storage, store.info.index, store.info.index_hash)
        if store.info.encoded and not len(index):
            raise ValueError("the index is empty")
    except (FileNotFoundError, StorageError, ValueError) as error:
        missing = was_removed(error.__cause__ or error)
        if missing and store.reload():
            return read_index(store)
        if isinstance(error, StorageError) and not missing:
            raise
        where = f"{store.url}/{store.info.index}"
        if store.bases is not None:
            raise StoreError(f"{where} is missing or damaged: create the view again.") from error
        raise damaged_index(where) from error
    return index


def changed_meanwhile(store: LatentStore) -> StoreError:
    """The error for a store that was sealed again while a command read it."""
    return StoreError(f"{store.url} was changed while it was read: run the command again.")


def is_there(store: LatentStore) -> bool:
    """Whether the store itself can still be read: its disk may be unmounted, its folder moved."""
    return any(store.storage.exists(path) for path in (DATASET_PATH, PLAN_PATH))


def is_complete(store: LatentStore) -> bool:
    """Whether every unit is committed and the seal is up to date; checks file names only.

    A view is complete when it exists.
    """
    if not store.sealed or store.bases is not None:
        return store.sealed
    committed, info = committed_revisions(store.storage), store.info
    return (
        info.items == store.plan.num_items
        and all(
            committed.get(unit.name) == info.revisions.get(unit.name, 0)
            for unit in store.plan.units
        )
        and all(
            store.storage.exists(path)
            for path in (info.index, info.metadata, ORIGIN_PATH)
            if path is not None
        )
    )


def frames_or_vectors(info: DatasetInfo) -> str:
    """The latents, such as "64 channels, 21.53 frames/s"; vectors and tokens have no rate."""
    channels = info.model["latent_channels"]
    if info.field and info.field.vectors:
        return f"{info.field.vectors} of {counted(channels, 'number')}"
    return f"{counted(channels, 'channel')}, {info.frame_rate:.2f} frames/s"


def described(url: str, info: DatasetInfo | None, *, sealed: bool) -> Mapping[str, object]:
    """The values that `repr` displays; `info` is None if it has not been read."""
    facts: dict[str, object] = {"url": repr(url)}
    if info is not None:
        facts |= {
            "records": info.encoded,
            "hours": f"{info.hours:.2f}",
            "model": info.model.get("asked") or info.model["name"],
            "latents": f"{info.dtype}, {frames_or_vectors(info)}",
        }
        if info.failed:
            facts["failed"] = info.failed
        if info.bases:
            facts["bases"] = ", ".join(repr(base.url) for base in info.bases)
            facts["left_out"] = info.skipped
    return facts if sealed else facts | {"complete": False}
