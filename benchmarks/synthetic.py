"""Stores of synthetic records, written with the library's own writers."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from latentmill.encoding.fingerprint import fingerprint
from latentmill.plan import Plan, UnitLimits, draft, freeze, read_items
from latentmill.record import Latent, Outcome, Record
from latentmill.sources.base import Item
from latentmill.storage.storage import Storage
from latentmill.store.commit import write_commit, write_unit
from latentmill.store.seal import seal, write_origin

RATE, HOP = 44100, 4096
COPIES = 1000  # of as many records, the last is almost a copy of the first


def model_document(channels: int) -> dict[str, Any]:
    """The settings of a store whose model does not exist."""
    model = {"name": "synthetic", "sample_rate": RATE, "channels": 1, "latent_channels": channels}
    return {
        "model": {**model, "hop": HOP, "scale_factor": 1.0},
        "chunking": {"stitch": "trim", "samples": 16 * HOP, "step": 8 * HOP, "overlap": 8},
        "settings": {"dtype": "float16"},
    }


def write_store(
    url: str,
    keys: Iterable[str],
    made: Callable[[Item], Record],
    document: dict[str, Any],
    *,
    per_unit: int,
    sealed: bool = True,
) -> None:
    """Write the records that `made` makes of items with these keys."""
    model, storage = document["model"], Storage(url)
    items = (Item(key, f"/music/{key}.wav", 1, "1", seconds=1.0) for key in keys)
    with draft(items, UnitLimits(unit_seconds=per_unit)) as drafted:
        plan = freeze(Plan("/music", document, model["name"], {}, "parquet", {}), drafted, storage)
    frames = document["chunking"]["samples"] // model["hop"]
    write_origin(storage, np.zeros((model["latent_channels"], frames), np.float32))
    for unit in plan.units:
        items_of_unit = read_items(storage, unit)
        commit = write_unit(
            storage,
            unit.name,
            (Outcome(item.key, "encoded", record=made(item)) for item in items_of_unit),
            format_name="parquet",
            fingerprint=fingerprint(document),
            info={"model": model, "dtype": "float16"},
        )
        write_commit(storage, commit, {"total_seconds": 1.0, "model_seconds": 1.0})
    if sealed:
        seal(storage, plan)


def copied(number: int) -> int:
    """The number of the record whose latent this one has."""
    return number - COPIES + 1 if number % COPIES == COPIES - 1 else number


def record(
    item: Item,
    number: int,
    latent: Latent,
    *,
    samples: int,
    rate: int = RATE,
    own: dict[str, Any] | None = None,
) -> Record:
    """A record; levels and content differ from those of every other number."""
    return Record(
        key=item.key,
        latent=latent,
        num_samples=samples,
        sample_rate=rate,
        source_uri=item.uri,
        source_sample_rate=rate,
        source_channels=2,
        content_hash=f"xxh3:{number * 2654435761 % 2**64:032x}",
        rms=0.05 + number * 4e-7,
        peak=0.5,
        levels=bytes([200]) * latent.shape[1],
        metadata=own or {},
    )
