"""Text from outside, made safe to print: names of files may hold what steers a terminal."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from typing import Any, TypeVar

T = TypeVar("T")

# Control characters (ESC, line ends, C1), half surrogate pairs, and the format characters that turn
# the direction of text around or are invisible; not the joiners, which some scripts need.
_UNSAFE = re.compile(
    "[\x00-\x1f\x7f-\x9f\u00ad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f"
    "\ud800-\udfff\ufeff\ufff9-\ufffb\U000e0000-\U000e007f]"
)


def printable(text: str) -> str:
    r"""The text on one line, its control characters written as escapes such as `\x1b`."""
    return _UNSAFE.sub(lambda match: ascii(match[0])[1:-1], text)


def printable_lines(text: str) -> str:
    """The same for text of several lines, whose line ends stay."""
    return "\n".join(map(printable, text.split("\n")))


def printable_value(value: T) -> T:
    """A value whose texts, at any depth, are printable: dataclasses, models, lists, mappings."""
    changed: Any = value
    if isinstance(value, str):
        changed = value if value.isascii() and value.isprintable() else printable(value)
    elif fields := getattr(type(value), "model_fields", None):  # pydantic, slow to import
        update = {name: printable_value(getattr(value, name)) for name in fields}
        changed = changed.model_copy(update=update)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {
            f.name: printable_value(getattr(value, f.name)) for f in dataclasses.fields(value)
        }
        changed = dataclasses.replace(value, **fields)
    elif isinstance(value, Mapping):
        changed = {printable_value(name): printable_value(part) for name, part in value.items()}
    elif isinstance(value, tuple) and hasattr(value, "_make"):
        changed = value._make(map(printable_value, value))
    elif isinstance(value, list | tuple):
        changed = type(value)(map(printable_value, value))
    return changed  # type: ignore[no-any-return]


def printable_json(value: object) -> str:
    r"""A value as JSON on one line, in which unsafe characters are escapes such as `\u202e`."""
    return _UNSAFE.sub(_json_escape, json.dumps(value, ensure_ascii=False))


def _json_escape(match: re.Match[str]) -> str:
    return json.dumps(match[0])[1:-1]
