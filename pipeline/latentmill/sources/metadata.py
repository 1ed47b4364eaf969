"""An item's own metadata, read from its sidecar files."""

from __future__ import annotations

import json
import posixpath
from typing import Any

import fsspec

from latentmill.errors import ItemError
from latentmill.sources.base import Item


def read_metadata(item: Item) -> dict[str, Any]:
    """Read the sidecars of an item: JSON objects are merged, a text file becomes `text`.

    Raises:
        ItemError: A sidecar cannot be read, or is not what its name says.
    """
    metadata: dict[str, Any] = {}
    for uri in item.sidecars:
        name = posixpath.basename(uri)
        try:
            with fsspec.open(uri, "rb") as file:
                text = file.read().decode("utf-8-sig")
        except OSError as error:
            raise ItemError(f"sidecar {name} cannot be read: {error}") from error
        except UnicodeDecodeError as error:
            raise ItemError(f"sidecar {name} is no UTF-8 text") from error
        if name.lower().endswith(".txt"):
            metadata["text"] = text.strip()
            continue
        try:
            value = json.loads(text)
        except ValueError as error:
            raise ItemError(f"sidecar {name} is no valid JSON: {error}") from error
        metadata.update(value if isinstance(value, dict) else {"json": value})
    return metadata
