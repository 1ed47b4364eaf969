"""A subset of a store, as a view or as a copy."""

from __future__ import annotations

import os
from collections.abc import Sequence

from latentmill.curation.copying import write_copy
from latentmill.curation.selecting import Duplicates, Selector
from latentmill.curation.views import Curated, check_sources, write_view
from latentmill.errors import ConfigError
from latentmill.reader.fields import Where
from latentmill.store.store import LatentStore, open_store


def select(
    store: LatentStore | str | os.PathLike[str],
    dest: str | os.PathLike[str],
    *,
    where: Where | None = None,
    keys: Sequence[str] | None = None,
    min_loudness: float | None = None,
    drop_duplicates: Duplicates | None = None,
    drop_outliers: bool = False,
    sample: float | None = None,
    stratify: str | None = None,
    seed: int = 0,
    copy: bool = False,
    overwrite: bool = False,
) -> Curated:
    """Write a subset of a store.

    By default this is a view: a store that refers to records in `store` by key and latent hash, and
    copies no latent. It is opened, trained on and verified as any store, while `store` exists. The
    conditions are applied in the order of the arguments; every record that a condition leaves out
    is counted, with the reason, and listed in the file `left_out` of dataset.json.

    Args:
        store: A complete store or a view.
        dest: A new folder or URL.
        where: A condition on stored fields and metadata, `"genre == 'jazz'"`; see `LatentDataset`.
        keys: Keep only the records with these keys.
        min_loudness: Leave out records with a lower RMS, in dB relative to full scale.
        drop_duplicates: Keep one record of those with equal files or latents (`exact`), or also of
            those with almost equal latents (`near`, which reads all latents).
        drop_outliers: Leave out records whose latents are unlike the others. Reads all latents.
        sample: Keep this number of records (1 or more), or this share of them (below 1).
        stratify: Sample the same share of each value of this field.
        seed: Seed of the sample.
        copy: Write a store with copies of the latents. If interrupted, the same call continues.
        overwrite: Replace a view that is at `dest`.

    Raises:
        ConfigError: An option is not valid, no record is left, or `dest` is in use.
        StoreError: A store is damaged.
    """
    if copy and overwrite:
        raise ConfigError("overwrite replaces views only: leave it out, and copy to a new folder.")
    if drop_duplicates not in (None, "exact", "near"):
        raise ConfigError(f"drop_duplicates is {drop_duplicates!r}: use exact or near.")
    _check_sample(sample, stratify, seed)
    opened = store if isinstance(store, LatentStore) else open_store(store)
    target = os.fspath(dest)
    check_sources([opened], target, copy=copy)
    selector = Selector(opened)
    if where is not None:
        selector.where(where)
    if keys is not None:
        selector.keys(keys)
    if min_loudness is not None:
        selector.min_loudness(min_loudness)
    if drop_duplicates is not None:
        selector.drop_duplicates(drop_duplicates)
    if drop_outliers:
        selector.drop_outliers()
    if sample is not None:
        selector.sample(sample, stratify, seed)
    if copy:
        return write_copy(target, [selector.chosen()])
    return write_view(target, [selector.chosen()], overwrite=overwrite)


def _check_sample(sample: float | None, stratify: str | None, seed: int) -> None:
    if sample is not None and not sample > 0:
        raise ConfigError(f"sample is {sample:g}: use a number of records or a share below 1.")
    if stratify is not None and sample is None:
        raise ConfigError("stratify has no effect without a sample: set sample, or leave it out.")
    if seed and sample is None:
        raise ConfigError("seed has no effect without a sample: set sample, or leave it out.")
