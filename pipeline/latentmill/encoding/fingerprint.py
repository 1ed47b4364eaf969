"""The hash over everything that changes the latents, and the version of this encoder in it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

# Raised when the same file, model and settings give other latents than before. Stores of another
# version stay readable; resuming or extending one is refused (`version_difference`).
# 2: loading gives what FFmpeg gives, in files where it did not before.
ENCODING_VERSION = 2


def fingerprint(document: Mapping[str, Any]) -> str:
    """The hash of a fingerprint document: 32 hex digits of its SHA-256."""
    text = json.dumps(document, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def version_difference(stored: Mapping[str, Any]) -> str | None:
    """Why this version of latentmill cannot add to a store of this fingerprint document."""
    version = stored.get("preprocessing", {}).get("encoding_version")
    if version == ENCODING_VERSION:
        return None
    made, action = "an earlier", "encode into a new output folder"
    if isinstance(version, int) and version > ENCODING_VERSION:
        made, action = "a later", "update latentmill or encode into a new output folder"
    return (
        f"was encoded by {made} version of latentmill, whose latents of the same audio can differ "
        f"(encoding version {version}, now {ENCODING_VERSION}): it stays readable, but to add to "
        f"it or resume it, {action}."
    )
