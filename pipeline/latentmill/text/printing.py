"""Makes text safe to print: file names and metadata may contain terminal control characters."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from typing import Any, TypeVar

T = TypeVar("T")

# Control characters (ESC, line breaks, C1), unpaired surrogates, and format characters that change
# the text direction or are invisible; not the joiners, which some scripts need.
_UNSAFE = re.compile(
    "[\x00-\x1f\x7f-\x9f\u00ad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f"
    "\ud800-\udfff\ufeff\ufff9-\ufffb\U000e0000-\U000e007f]"
)


def printable(text: str) -> str:
    r"""Return the text on one line, with control characters escaped as in `\x1b`."""
    return _UNSAFE.sub(lambda match: ascii(match[0])[1:-1], text)


def printable_lines(text: str) -> str:
    """Like `printable`, but keeps line breaks."""
    return "\n".join(map(printable, text.split("\n")))


def counted(count: int, noun: str) -> str:
    """Format a number with its noun, as in "1 item" and "2 items"."""
    return f"{count} {noun}{'s' * (count != 1)}"


def number_text(value: float, digits: int = 3) -> str:
    """Format a number with `digits` significant digits; one below 1e15 without an exponent."""
    text = f"{value:.{digits}g}"
    return f"{value:.0f}" if "e+" in text and abs(value) < 1e15 else text


def clock_time(seconds: float) -> str:
    """Format a duration as 2:05 or 1:02:05."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"


def size_text(count: int) -> str:
    """Format a number of bytes as 1.5 GB."""
    size = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.4g} {unit}"
        size /= 1000
    return f"{number_text(size, 4)} TB"


def printable_value(value: T) -> T:
    """Make all strings in a value printable, at any depth of dataclasses, models and containers."""
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
    r"""Format a value as one line of JSON, with unsafe characters escaped as in `\u202e`."""
    return _UNSAFE.sub(
        lambda match: json.dumps(match[0])[1:-1], json.dumps(value, ensure_ascii=False)
    )


def one_line(error: BaseException) -> str:
    """An exception's message on one line of at most 300 characters, without full stops."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text[:300].rstrip(". ").replace(". ", "; ")
