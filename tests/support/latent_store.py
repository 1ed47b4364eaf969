"""Stores of made-up latents, written through the real writers, commits and seal; no model runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from latentmill.encoding.fingerprint import fingerprint
from latentmill.plan import FieldEntry, Plan, Unit, UnitLimits, draft, freeze, load, read_items
from latentmill.record import Outcome, Record
from latentmill.sources.base import Item
from latentmill.storage.storage import Storage
from latentmill.store.commit import next_revisions, write_commit, write_unit
from latentmill.store.seal import seal, write_origin
from latentmill.store.store import LatentStore
from latentmill.store.tidy import tidy

RATE, HOP = 44100, 4096


def latent_of(number: int, frames: int, channels: int = 4) -> np.ndarray:
    """A latent `[channels, frames]` whose every value tells its item, channel and frame.

    Exact in float16 up to 2048 frames: the item's number, and frame and channel scaled.
    """
    time = np.arange(frames, dtype=np.float64) % 1024
    values = (number % 32) + time[None] / 1024 + np.arange(channels)[:, None] * 64
    return values.astype(np.float16)


@dataclass(frozen=True)
class MadeUp:
    """What the items of a store are, by their number."""

    lengths: Sequence[int]
    channels: int = 4
    latents: Sequence[np.ndarray] | None = None
    metadata: Sequence[Mapping[str, Any]] | None = None
    failed: Sequence[int] = ()
    content_hashes: Sequence[str] | None = None
    rms: Sequence[float] | None = None
    levels: Sequence[bytes | None] | None = None

    def outcome(self, item: Item) -> Outcome:
        """What becomes of an item."""
        number = int(item.key[-5:])
        if number in self.failed:
            return Outcome(item.key, "failed", reason="made up")
        return Outcome(item.key, "encoded", record=self._record(number, item))

    def _record(self, number: int, item: Item) -> Record:
        length = self.lengths[number]
        made = latent_of(number, length, self.channels)
        return Record(
            key=item.key,
            latent=self.latents[number] if self.latents else made,
            num_samples=length * HOP - 7,
            sample_rate=RATE,
            source_uri=item.uri,
            source_sample_rate=48000,
            source_channels=2,
            content_hash=self.content_hashes[number] if self.content_hashes else "xxh3:0",
            rms=self.rms[number] if self.rms else 0.1,
            peak=0.5,
            group=f"group {number // 4}",
            role=("drums", "bass", "vocals", "other")[number % 4],
            levels=self.levels[number] if self.levels else None,
            metadata=self.metadata[number] if self.metadata else {"number": number},
        )


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
    content_hashes: Sequence[str] | None = None,
    field: FieldEntry | None = None,
    failed: Sequence[int] = (),
    origin: np.ndarray | None = None,
    rms: Sequence[float] | None = None,
    levels: Sequence[bytes | None] | None = None,
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
    plan = Plan("/music", document, "made-up", {}, format_name, {}, field=field)
    storage = Storage(url)
    with draft(items, UnitLimits(unit_seconds=per_unit)) as drafted:
        plan = freeze(plan, drafted, storage)
    if origin is None:  # silence is not zero, and its borders are not its middle
        origin = np.full((channels, 16), 0.5, np.float32)
        origin[:, 0], origin[:, -1] = 0.25, 0.75
    write_origin(storage, origin)
    made_up = MadeUp(lengths, channels, latents, metadata, failed, content_hashes, rms, levels)
    for unit in plan.units:
        _write_unit(storage, plan, unit, made_up)
    if sealed:
        seal(storage, plan)
    return LatentStore(url, device="cpu")


def write_again(
    url: str, units: Sequence[int], latents: Sequence[np.ndarray], *, failed: Sequence[int] = ()
) -> LatentStore:
    """Write the next revision of some units, seal, and remove what was superseded, as runs do.

    Args:
        url: A store of `write_latents`.
        units: The units.
        latents: The latents of all items of the store, as they are to be.
        failed: The numbers of items that fail now.
    """
    storage = Storage(url)
    plan = load(storage)
    assert plan is not None
    lengths = [latent.shape[-1] for latent in latents]
    made_up = MadeUp(lengths, latents=latents, failed=failed)
    revisions = next_revisions(storage)
    for number in units:
        unit = plan.units[number]
        _write_unit(storage, plan, replace(unit, revision=revisions[unit.name]), made_up)
    seal(storage, plan)
    tidy(storage)
    return LatentStore(url, device="cpu")


def _write_unit(storage: Storage, plan: Plan, unit: Unit, made_up: MadeUp) -> None:
    outcomes = map(made_up.outcome, read_items(storage, unit))
    commit = write_unit(
        storage,
        unit.name,
        outcomes,
        format_name=plan.format,
        fingerprint=fingerprint(plan.fingerprint),
        info={"model": plan.fingerprint["model"], "dtype": "float16"},
        revision=unit.revision,
    )
    write_commit(storage, commit, {"total_seconds": 1.0})
