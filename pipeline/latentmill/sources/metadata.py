"""Reads the metadata of an item: from its source and its sidecar files."""

from __future__ import annotations

import json
import math
import posixpath
import re
from typing import Any

from latentmill.errors import ItemError
from latentmill.sources.base import Item
from latentmill.sources.columns import METADATA_LIMIT
from latentmill.sources.files import read_bytes
from latentmill.storage.remote import RANGE_NOT_SATISFIABLE, cause_of, status_of, storage_errors
from latentmill.text.redact import may_hold_secrets, redact_metadata, redact_value

MAX_NESTING = 500
"""Maximum nesting of lists and objects. Python reads and writes JSON recursively, and its limit of
1,000 levels includes the calls around it."""

_NOT_TEXT = re.compile(r"[\0-\x08\x0e-\x1a\x1c-\x1f]")

# A member of a tar that could not be parsed when the tar was listed.
_MEMBER = re.compile(r"(?P<uri>.*)#bytes=(?P<first>\d+)-(?P<last>\d+)/[^/]*", re.DOTALL)


def read_metadata(item: Item) -> dict[str, Any]:
    """The item's metadata merged with that of its sidecars; see `parse_sidecar`.

    Raises ItemError if a sidecar is unreadable or invalid, or contradicts other metadata.
    """
    metadata: dict[str, Any] = json.loads(item.metadata)
    origins = dict.fromkeys(metadata, "the source")  # the origin of each key
    for uri in item.sidecars:
        name = posixpath.basename(uri)
        for key, value in parse_sidecar(name, _read(uri, name)).items():
            if key in metadata and metadata[key] != value:
                raise ItemError(
                    f"{origins[key]} and {name} give different values of {key}: remove one"
                )
            metadata[key] = value
            origins[key] = name
    if is_too_deep(metadata):
        raise ItemError(f"its metadata is nested more than {MAX_NESTING} levels deep")
    return metadata


def is_too_deep(value: Any) -> bool:
    """Whether a JSON value has more than `MAX_NESTING` levels; does not recurse."""
    level, depth = [value], 0
    while level := [part for part in level if isinstance(part, dict | list)]:
        depth += 1
        if depth > MAX_NESTING:
            return True
        level = [
            child for part in level for child in (part.values() if isinstance(part, dict) else part)
        ]
    return False


def parse_sidecar(name: str, data: bytes) -> dict[str, Any]:
    """The metadata in a sidecar: a `.json` object as it is, a `.txt` as `text`, a `.cls` as `cls`.

    Secrets in URLs are masked. Raises ItemError if the content does not fit the extension.
    """
    if name.lower().endswith(".txt"):
        return {"text": redact_metadata(_text(name, data).strip())}
    if name.lower().endswith(".cls"):
        label = _text(name, data).strip()
        return {
            "cls": int(label) if re.fullmatch(r"-?[0-9]{1,18}", label) else redact_metadata(label)
        }
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ItemError(f"sidecar {name} is not UTF-8: convert it") from error
    try:
        value = json.loads(text, parse_constant=_refuse, parse_float=_finite)
        json.dumps(value, ensure_ascii=False).encode()  # as it will be stored
    except UnicodeEncodeError as error:
        raise ItemError(
            f"sidecar {name} contains half a surrogate pair, which is not text: correct it"
        ) from error
    except (ValueError, RecursionError) as error:
        raise ItemError(f"sidecar {name} is not valid JSON: {error}") from error
    if may_hold_secrets(text):
        value = redact_value(value)
    return value if isinstance(value, dict) else {"json": value}


def _text(name: str, data: bytes) -> str:
    """The text of a `.txt`: UTF-8, UTF-16 with a byte order mark, or else Windows-1252.

    Windows-1252 includes Latin-1 and the quotes and dashes of older editors.
    """
    marked = data.startswith((b"\xff\xfe", b"\xfe\xff"))
    for encoding in ("utf-16",) if marked else ("utf-8-sig", "cp1252", "latin-1"):
        try:
            text = data.decode(encoding)
        except UnicodeDecodeError:
            continue
        if not _NOT_TEXT.search(text):
            return text
    raise ItemError(f"sidecar {name} is not a text file: remove it, or save it as UTF-8")


def _read(uri: str, name: str) -> bytes:
    match = _MEMBER.fullmatch(uri)
    try:
        if match:
            data = read_bytes(match["uri"], int(match["first"]), int(match["last"]) + 1)
        else:
            data = read_bytes(uri, 0, METADATA_LIMIT + 1)
    except storage_errors() as error:
        if status_of(error) == RANGE_NOT_SATISFIABLE:  # it is empty
            return b""
        raise ItemError(f"sidecar {name} cannot be read: {cause_of(error)}") from error
    if len(data) > METADATA_LIMIT:
        raise ItemError(f"sidecar {name} exceeds {METADATA_LIMIT >> 20} MiB: shorten or remove it")
    return data


def _refuse(constant: str) -> float:
    """Refuse NaN and Infinity: Python accepts them, but other readers of the store do not."""
    raise ValueError(f"{constant} is not a JSON number")


def _finite(literal: str) -> float:
    """Refuse numbers such as 1e999, which Python reads as infinity."""
    number = float(literal)
    if math.isinf(number):
        raise ValueError(f"{literal[:20]} is out of the range of a float")
    return number
