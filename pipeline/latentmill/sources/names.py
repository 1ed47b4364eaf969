"""Converts paths to keys of items."""

from __future__ import annotations

import posixpath
import re
from collections import Counter
from collections.abc import Sequence

from latentmill.errors import SourceError

# Most names match and are used as they are.
_PLAIN = re.compile(r"[\w -][\w .#-]*(/[\w -][\w .#-]*)*", re.ASCII)


def without_extensions(paths: Sequence[str]) -> dict[str, str]:
    """The name of each path: without its extension, unless another path has the same name then."""
    names = {path: posixpath.splitext(path)[0] for path in paths}
    while True:
        uses = Counter(names.values())
        clashing = [path for path, name in names.items() if uses[name] > 1 and name != path]
        if not clashing:
            return names
        names.update({path: path for path in clashing})


def is_apple_double(path: str) -> bool:
    """Whether macOS has created the file beside another one: `._song.wav`, `__MACOSX/...`.

    Such files contain attributes of the other file and no audio.
    """
    folder, _, name = path.rpartition("/")
    return name.startswith("._") or "__MACOSX" in folder.split("/")


APPLE_DOUBLE = "files of macOS (._*, __MACOSX)"
"""The reason under which they are counted as ignored."""


def as_key(name: str) -> str:
    """Convert an untrusted name to a key: relative, without `..`, and valid text.

    Keys are never used as paths, but this one would be harmless if it were.
    """
    if _PLAIN.fullmatch(name):
        return name
    text = as_text(name).replace("\0", "")
    parts = (part for part in text.split("/") if part not in ("", "."))
    return "/".join("%2E%2E" if part == ".." else part for part in parts)


def not_empty(key: str, source: str, place: str) -> str:
    """The key of a row; raises SourceError if it is empty, as that of `/` or `.`."""
    if not key:
        raise SourceError(
            f"{source} has an empty key in {place}: a key or path needs more than slashes and "
            "dots; correct it or remove the row."
        )
    return key


def as_text(name: str) -> str:
    r"""A name as text that can be written as UTF-8: other bytes become escapes, such as `\xe9`."""
    try:
        data = name.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:  # half a surrogate pair, from JSON
        data = name.encode("utf-8", "backslashreplace")
    return data.decode("utf-8", "backslashreplace")


def dotted(extensions: Sequence[str]) -> tuple[str, ...]:
    """Extensions in lower case, each with its dot."""
    return tuple(sorted({"." + extension.lower().lstrip(".") for extension in extensions}))
