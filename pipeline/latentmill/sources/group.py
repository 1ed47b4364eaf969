"""Which items belong together, and what each is among them: the stems of a song."""

from __future__ import annotations

import contextlib
import re
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import Any

from latentmill.errors import ConfigError, ItemError
from latentmill.sources.base import Item, Source
from latentmill.sources.metadata import read_metadata

METADATA = "metadata:"
_AHEAD = 64  # items whose sidecars are read at the same time
_THREADS = 16


class GroupedSource:
    """A source whose items are told their group and role.

    The rule is a regular expression with a group named `group`, and perhaps one named `role`, that
    is searched in an item's key: `(?P<group>.*)/(?P<role>[^/]+)$`. Or it is
    `metadata:FIELD[,FIELD]`, the fields that hold the group and the role; then sidecars are read
    while the plan is made. Items that it says nothing of keep what they have.

    Raises:
        ConfigError: The rule is no such thing.
    """

    def __init__(self, source: Source, rule: str) -> None:
        self._source = source
        self._rule = check_rule(rule)
        self.uri = source.uri
        self.ignored = source.ignored

    def items(self) -> Iterator[Item]:
        """Stream the source's items; see `Source.items`."""
        if isinstance(self._rule, re.Pattern):
            items: Iterator[Item] = map(partial(_by_key, self._rule), self._source.items())
        else:
            fields = dict(zip(("group", "role"), self._rule, strict=False))
            items = _ahead(lambda item: _by_metadata(item, fields), self._source.items())
        example, grouped = None, False
        for item in items:
            example = example or item.key
            grouped = grouped or item.group is not None or item.role is not None
            yield item
        if example is not None and not grouped:
            what = "field" if isinstance(self._rule, list) else "expression"
            raise ConfigError(
                f"the {what} of --group-by matches none of the items, so there are no groups: "
                f"correct it (one key is {example!r}), or leave it out."
            )


def check_rule(rule: str) -> re.Pattern[str] | list[str]:
    """The pattern, or the fields, that a rule stands for.

    Raises:
        ConfigError: It is no rule.
    """
    if not rule.startswith(METADATA):
        return _compiled(rule)
    fields = [field.strip() for field in rule.removeprefix(METADATA).split(",")]
    if not all(fields) or len(fields) > 2:
        raise ConfigError(
            f"invalid --group-by {rule!r}: name one or two fields, such as metadata:song,stem."
        )
    return fields


def _compiled(rule: str) -> re.Pattern[str]:
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


def _by_key(pattern: re.Pattern[str], item: Item) -> Item:
    match = pattern.search(item.key)
    return item if match is None else _told(item, match.groupdict().get)


def _by_metadata(item: Item, fields: Mapping[str, str]) -> Item:
    metadata: Mapping[str, Any] = {}
    with contextlib.suppress(ItemError):  # the item will fail for that when it is encoded
        metadata = read_metadata(item)
    return _told(item, lambda what: metadata.get(fields.get(what, "")))


def _told(item: Item, value: Callable[[str], Any]) -> Item:
    """The item with a group and role, where there are any."""
    group, role = value("group"), value("role")
    return replace(
        item,
        group=item.group if group in (None, "") else _text(group),
        role=item.role if role in (None, "") else _text(role),
    )


def _text(value: Any) -> str:
    """A field as text; JSON's escapes may hold half a surrogate pair, which is none."""
    return str(value).encode("utf-8", "backslashreplace").decode()


def _ahead(work: Callable[[Item], Item], items: Iterator[Item]) -> Iterator[Item]:
    """Map with threads, in order; a few items ahead, so that memory stays bounded."""
    running: deque[Future[Item]] = deque()
    with ThreadPoolExecutor(_THREADS) as pool:
        for item in items:
            running.append(pool.submit(work, item))
            if len(running) >= _AHEAD:
                yield running.popleft().result()
        yield from (future.result() for future in running)
