"""What a store is, for people: its short description, and a warning if it is not complete."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING

from latentmill.errors import IncompleteStoreWarning

if TYPE_CHECKING:
    from latentmill.store.schema import DatasetInfo
    from latentmill.store.store import LatentStore


def warn_incomplete(store: LatentStore) -> None:
    """Warn if a store does not hold all of its plan yet, with counts."""
    if store.sealed:
        return
    info, units = store.info, store.plan.units
    open_items = info.items - info.encoded - info.skipped - info.failed
    done = sum(unit.name in store.commits for unit in units)
    warnings.warn(
        f"{store.url} is not complete: {done} of {len(units)} units are committed, so that "
        f"{open_items} of {info.items} items are missing. Run `latentmill encode` again with the "
        "same options to complete it.",
        IncompleteStoreWarning,
        stacklevel=3,
    )


def described(url: str, info: DatasetInfo | None, *, sealed: bool) -> Mapping[str, object]:
    """What is shown of a store; `info` is None if it would have to be read first."""
    facts: dict[str, object] = {"url": repr(url)}
    if info is not None:
        model = info.model
        rate = model["sample_rate"] / model["hop"]
        facts |= {
            "records": info.encoded,
            "hours": f"{info.hours:.2f}",
            "model": model.get("asked") or model["name"],
            "latents": f"{info.dtype}, {model['latent_channels']} channels, {rate:.2f} frames/s",
        }
        if info.failed:
            facts["failed"] = info.failed
    return facts if sealed else facts | {"complete": False}
