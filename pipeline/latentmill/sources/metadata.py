"""An item's own metadata, read from its sidecar files."""

from __future__ import annotations

import json
import posixpath
from typing import Any

import fsspec

from latentmill.errors import ItemError
from latentmill.sources.base import Item
from latentmill.storage import cause_of, storage_errors


def read_metadata(item: Item) -> dict[str, Any]:
    """Read the sidecars of an item: JSON objects are merged, a text file becomes `text`.

    Raises:
        ItemError: A sidecar cannot be read, is not what its name says, or contradicts another.
    """
    metadata: dict[str, Any] = {}
    givers: dict[str, str] = {}  # the sidecar that gave a key
    for uri in item.sidecars:
        name = posixpath.basename(uri)
        for key, value in _read(uri, name).items():
            if key in metadata and metadata[key] != value:
                raise ItemError(f"sidecars {givers[key]} and {name} both give {key}: remove one")
            metadata[key] = value
            givers[key] = name
    return metadata


def _read(uri: str, name: str) -> dict[str, Any]:
    """What one sidecar says."""
    try:
        with fsspec.open(uri, "rb") as file:
            text = file.read().decode("utf-8-sig")
    except storage_errors() as error:
        raise ItemError(f"sidecar {name} cannot be read: {cause_of(error)}") from error
    except UnicodeDecodeError as error:
        raise ItemError(f"sidecar {name} is no UTF-8 text") from error
    if name.lower().endswith(".txt"):
        return {"text": text.strip()}
    try:
        value = json.loads(text, parse_constant=_refuse)
        json.dumps(value, ensure_ascii=False).encode()  # as it will be stored
    except UnicodeEncodeError as error:
        raise ItemError(f"sidecar {name} holds half a surrogate pair, which is no text") from error
    except (ValueError, RecursionError) as error:
        raise ItemError(f"sidecar {name} is no valid JSON: {error}") from error
    return value if isinstance(value, dict) else {"json": value}


def _refuse(constant: str) -> float:
    """Python takes NaN and Infinity; whoever reads the store as JSON will not."""
    raise ValueError(f"{constant} is none of its numbers")
