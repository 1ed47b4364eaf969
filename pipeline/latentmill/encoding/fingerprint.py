"""The hash over everything that changes the latents, which includes the encoding version."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from latentmill.models.base import MEANS_FIRST, ROWS, has_deviations

# Increased when the same file, model and settings result in other latents than before. Stores of
# another version stay readable; resuming or extending them is refused (`version_difference`).
# 2: more files are loaded exactly as FFmpeg decodes them. Not increased when wrong samples in some
# MP3s were fixed, so that existing stores, most of which have none of them, can be resumed.
ENCODING_VERSION = 2


def fingerprint(document: Mapping[str, Any]) -> str:
    """The first 32 hex digits of the SHA-256 of a fingerprint document."""
    text = json.dumps(document, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def version_difference(stored: Mapping[str, Any]) -> str | None:
    """Why this version of latentmill cannot add to the store, or None if it can."""
    if reason := rows_difference(stored.get("model", {})):
        return reason
    version = stored.get("preprocessing", {}).get("encoding_version")
    if version == ENCODING_VERSION:
        return None
    made, action = "an earlier", "encode into a new output folder"
    if isinstance(version, int) and version > ENCODING_VERSION:
        made, action = "a later", "update latentmill or encode into a new output folder"
    return (
        f"was encoded by {made} version of latentmill, whose latents can differ (encoding version "
        f"{version}, now {ENCODING_VERSION}): you can still read it, but to resume or extend it, "
        f"{action}."
    )


def rows_difference(model: Mapping[str, Any]) -> str | None:
    """Why the rows of latents are not in the order that readers expect, or None if they are."""
    if not has_deviations(model) or not model.get("split") or model.get(ROWS) == MEANS_FIRST:
        return None
    return (
        "was encoded by an earlier version of latentmill, which stored the standard deviations of "
        "the left channel before the means of the right one: encode into a new output folder."
    )
