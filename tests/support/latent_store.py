"""Stores of made-up latents, written through the real writers, commits and seal; no model runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from latentmill.encoding.fingerprint import fingerprint
from latentmill.plan import Cutting, Plan, draft, freeze, read_items
from latentmill.record import Outcome, Record
from latentmill.sources.base import Item
from latentmill.storage.storage import Storage
from latentmill.store.commit import write_commit, write_unit
from latentmill.store.seal import seal, write_origin
from latentmill.store.store import LatentStore

RATE, HOP = 44100, 4096


def latent_of(number: int, frames: int, channels: int = 4) -> np.ndarray:
    """A latent `[channels, frames]` whose every value tells its item, channel and frame.

    Exact in float16 up to 2048 frames: the item's number, and frame and channel scaled.
    """
    time = np.arange(frames, dtype=np.float64) % 1024
    values = (number % 32) + time[None] / 1024 + np.arange(channels)[:, None] * 64
    return values.astype(np.float16)


def write_latents(
    url: str,
    lengths: Sequence[int],
    *,
    channels: int = 4,
    per_unit: int = 8,
    format_name: str = "parquet",
    prefix: str = "item",
    metadata: Sequence[Mapping[str, Any]] | None = None,
    latents: Sequence[np.ndarray] | None = None,
    model: Mapping[str, Any] | None = None,
    stitch: str = "trim",
    sealed: bool = True,
) -> LatentStore:
    """Write a store of one latent for each length; key `prefix/NNNNN`, units of `per_unit`."""
    made = {"name": "made-up", "sample_rate": RATE, "channels": 1, "latent_channels": channels}
    made |= {"hop": HOP, "scale_factor": 2.0, **(model or {})}
    samples = 16 * HOP
    document = {
        "model": made,
        "chunking": {"stitch": stitch, "samples": samples, "step": samples // 2, "overlap": 8},
        "settings": {"dtype": "float16"},
    }
    names = [f"{prefix}/{number:05d}" for number in range(len(lengths))]
    items = [Item(name, f"/music/{name}.wav", 1, "1", seconds=1.0) for name in names]
    plan = Plan("/music", document, "made-up", {}, format_name, {})
    storage = Storage(url)
    with draft(items, Cutting(unit_seconds=per_unit)) as drafted:
        plan = freeze(plan, drafted, storage)
    # Silence is no zero, and its borders are not its middle.
    origin = np.full((channels, 16), 0.5, np.float32)
    origin[:, 0], origin[:, -1] = 0.25, 0.75
    write_origin(storage, origin)
    for unit in plan.units:
        outcomes = []
        for place, item in enumerate(read_items(storage, unit), unit.number * per_unit):
            latent = latents[place] if latents else latent_of(place, lengths[place], channels)
            record = Record(
                key=item.key,
                latent=latent,
                num_samples=lengths[place] * HOP - 7,
                sample_rate=RATE,
                source_uri=item.uri,
                source_sample_rate=48000,
                source_channels=2,
                content_hash="xxh3:0",
                rms=0.1,
                peak=0.5,
                group=f"group {place // 4}",
                role=("drums", "bass", "vocals", "other")[place % 4],
                metadata=metadata[place] if metadata else {"number": place},
            )
            outcomes.append(Outcome(item.key, "encoded", record=record))
        commit = write_unit(
            storage,
            unit.name,
            outcomes,
            format_name=format_name,
            fingerprint=fingerprint(document),
            info={"model": made, "dtype": "float16"},
        )
        write_commit(storage, commit, {"total_seconds": 1.0})
    if sealed:
        seal(storage, plan)
    return LatentStore(url, device="cpu")
