"""Groups of items, such as the stems of a song, and the role of each item in its group."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from latentmill.errors import ConfigError, ItemError
from latentmill.sources.address import seconds_text
from latentmill.sources.base import Item, Source
from latentmill.sources.metadata import read_metadata
from latentmill.storage.threads import map_in_threads

METADATA = "metadata:"
SAME_START = 0.001  # seconds by which the starts of stems that begin together may differ
_PENDING = 64  # items whose sidecars are read at the same time
_THREADS = 16


class GroupedSource:
    """A source that sets the group and role of another source's items.

    The rule is a regular expression with a group named `group`, and optionally one named `role`,
    that is searched in an item's key: `(?P<group>.*)/(?P<role>[^/]+)$`. Or it is
    `metadata:FIELD[,FIELD]`, the metadata fields with the group and the role; then sidecars are
    read during planning. Items that the rule does not match stay as they are. Raises ConfigError
    if the rule is not valid.
    """

    def __init__(self, source: Source, rule: str) -> None:
        self._source = source
        self._rule = check_rule(rule)
        self.uri = source.uri
        self.ignored = source.ignored

    def items(self) -> Iterator[Item]:
        """Yield the source's items; see `Source.items`."""
        if isinstance(self._rule, re.Pattern):
            items: Iterator[Item] = map(partial(_by_key, self._rule), self._source.items())
        else:
            fields = dict(zip(("group", "role"), self._rule, strict=False))
            work = partial(_by_metadata, fields)
            items = map_in_threads(work, self._source.items(), threads=_THREADS, prefetch=_PENDING)
        example, grouped = None, False
        for item in items:
            example = example or item.key
            grouped = grouped or item.group is not None or item.role is not None
            yield item
        if example is not None and not grouped:
            what = "field" if isinstance(self._rule, list) else "expression"
            raise ConfigError(
                f"the {what} of --group-by matches no item: correct it (one of the keys is "
                f"{example!r}), or remove the option."
            )


def check_rule(rule: str) -> re.Pattern[str] | list[str]:
    """The regular expression or the metadata fields of a rule.

    Raises ConfigError if it is neither.
    """
    if rule.startswith(METADATA):
        fields = [field.strip() for field in rule.removeprefix(METADATA).split(",")]
        if not all(fields) or len(fields) > 2:
            raise ConfigError(
                f"invalid --group-by {rule!r}: give one or two fields, such as metadata:song,stem."
            )
        return fields
    try:
        pattern = re.compile(rule)
    except re.error as error:
        raise ConfigError(
            f"invalid --group-by {rule!r}: not a valid regular expression ({error})."
        ) from error
    if unknown := sorted(set(pattern.groupindex) - {"group", "role"}):
        raise ConfigError(
            f"invalid --group-by {rule!r}: unknown group {', '.join(unknown)}; use "
            "(?P<group>...) and (?P<role>...)."
        )
    if "group" not in pattern.groupindex:
        raise ConfigError(
            f"invalid --group-by {rule!r}: it must contain (?P<group>...), or be metadata:FIELD."
        )
    return pattern


def groups_together(
    songs: Sequence[str], starts: Sequence[float]
) -> tuple[npt.NDArray[np.int64], list[str]]:
    """The number of each stem's group, and the names of the groups, sorted by song and start.

    Stems of a song are in one group if they begin within `SAME_START`. The name of a group is that
    of the song, or `song#12.5` if groups of the song begin at several times.
    """
    order = {song: number for number, song in enumerate(sorted(set(songs)))}
    numbers = np.array([order[song] for song in songs], np.int64)
    begins = np.array(starts, np.float64)
    place = np.lexsort((begins, numbers))
    apart = (np.diff(numbers[place]) != 0) | (np.diff(begins[place]) > SAME_START)
    first = place[np.concatenate([[True], apart])] if len(place) else place
    groups = np.empty(len(place), np.int64)
    groups[place] = np.concatenate([[0], np.cumsum(apart)])[: len(place)]
    several = np.bincount(numbers[first], minlength=len(order)) > 1
    names = [
        f"{songs[one]}#{seconds_text(starts[one])}" if several[numbers[one]] else songs[one]
        for one in first.tolist()
    ]
    return groups, names


def _by_key(pattern: re.Pattern[str], item: Item) -> Item:
    match = pattern.search(item.key)
    return item if match is None else _with_group(item, match.groupdict().get)


def _by_metadata(fields: Mapping[str, str], item: Item) -> Item:
    metadata: Mapping[str, Any] = {}
    with contextlib.suppress(ItemError):  # encoding will report it
        metadata = read_metadata(item)
    return _with_group(item, lambda what: metadata.get(fields.get(what, "")))


def _with_group(item: Item, value: Callable[[str], Any]) -> Item:
    """The item with the values of `group` and `role` that are not empty."""
    group, role = value("group"), value("role")
    return replace(
        item,
        group=item.group if group in (None, "") else _text(group),
        role=item.role if role in (None, "") else _text(role),
    )


def name_in(metadata: Mapping[str, Any], field: str) -> str | None:
    """The group or role in an item's own metadata: a text or a number; other values are none."""
    value = metadata.get(field)
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        return None
    return _text(value) or None


def _text(value: Any) -> str:
    """A field as text that can be written as UTF-8; see `is_text`."""
    return str(value).encode("utf-8", "backslashreplace").decode()
