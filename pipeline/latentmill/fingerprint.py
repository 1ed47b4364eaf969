"""The hash by which stores and commits are compared; `config.py` says what goes into it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any


def fingerprint(document: Mapping[str, Any]) -> str:
    """The hash of a fingerprint document: 32 hex digits of its SHA-256."""
    text = json.dumps(document, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:32]
