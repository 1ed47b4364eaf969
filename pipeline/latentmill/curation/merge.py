"""Several stores as one, as a view or as a copy."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence

from latentmill.curation.copying import write_copy
from latentmill.curation.selecting import Selector
from latentmill.curation.views import Curated, check_sources, write_view
from latentmill.errors import ConfigError
from latentmill.store.store import LatentStore, open_store


def merge(
    stores: Sequence[LatentStore | str | os.PathLike[str]],
    dest: str | os.PathLike[str],
    *,
    prefix: bool = False,
    copy: bool = False,
    overwrite: bool = False,
) -> Curated:
    """Write a store with all records of several stores that were encoded with the same settings.

    Args:
        stores: Complete stores or views.
        dest: A new folder or URL.
        prefix: Prefix each key and group with the folder name of its store, `latents/KEY`. Without
            it, a key that two stores have is an error.
        copy: Write a store with copies of the latents instead of a view; see `select`.
        overwrite: Replace a view that is at `dest`.

    Raises:
        ConfigError: The stores differ in their settings or have the same keys, or `dest` is in use.
        StoreError: A store is damaged.
    """
    opened = [one if isinstance(one, LatentStore) else open_store(one) for one in stores]
    if not opened:
        raise ConfigError("merge needs at least one store.")
    target = os.fspath(dest)
    if copy and overwrite:
        raise ConfigError("overwrite replaces views only: leave it out, and copy to a new folder.")
    check_sources(opened, target, copy=copy)
    names = [store.url.rstrip("/").rpartition("/")[2] for store in opened]
    repeated = [name for name, count in Counter(names).items() if count > 1]
    if prefix and repeated:
        raise ConfigError(
            f"Two stores have the folder name {repeated[0]!r}, so --prefix would not make their "
            "keys unique: rename one folder."
        )
    chosen = [
        Selector(store).chosen(f"{name}/" if prefix else "")
        for store, name in zip(opened, names, strict=True)
    ]
    if copy:
        return write_copy(target, chosen)
    return write_view(target, chosen, overwrite=overwrite)
