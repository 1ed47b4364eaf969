"""What the page needs to know about the store."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from latentmill.ops.origin import POOR
from latentmill.record import MIXES
from latentmill.store.describe import frames_or_vectors
from latentmill.store.store import LatentStore
from latentmill.view.catalog import Catalog
from latentmill.view.desk import why_no_pan, why_no_sound
from latentmill.view.query import MAX_CHANNELS, MAX_SECONDS


def facts(store: LatentStore, catalog: Catalog) -> dict[str, Any]:
    """The store, its fields, and what the mixing desk can do."""
    info, model = store.info, store.info.model
    card = store.origin.linearity
    codes = "Its latents are codes, which cannot be mixed." if store.codes else ""
    return {
        "name": store.url.rstrip("/").rpartition("/")[2] or store.url,
        "url": store.url,
        "records": len(store),
        "hours": info.hours,
        "sealed": store.sealed,
        "model": model.get("asked") or model["name"],
        "rate": model["sample_rate"],
        "hop": model["hop"],
        "channels": model["channels"],
        "values": f"{frames_or_vectors(info)}, {info.dtype}",
        "why_no_sound": why_no_sound(store),
        "why_no_mix": why_no_sound(store) or codes,
        "why_no_pan": why_no_pan(store),
        "chunked": store.chunking.stitch == "none",
        "additivity": None if card is None else card.additivity,
        "poor": card is not None and card.additivity > POOR,
        "mix_roles": MIXES,
        "max_channels": MAX_CHANNELS,
        "max_seconds": MAX_SECONDS,
        "fields": [asdict(field) for field in catalog.fields.values()],
    }
