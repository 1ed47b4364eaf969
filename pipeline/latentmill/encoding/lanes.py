"""Lanes: items of a unit that are loaded side by side, so that all load threads have work.

A unit's items are read in the order of their lengths, so that chunks of equal length follow each
other and fill batches. They are divided among at most `LANES` lanes by their lengths. A lane loads
its items one after the other. The encoder takes one event from each lane in turn, so the batches
depend on the unit's items alone: not on threads, and not on time.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from typing import TypeAlias, TypeVar

from latentmill.audio.media import is_remote
from latentmill.sources.base import Item, TableCell, known_seconds

LANES = 16
PACKING = 3
"""The order in which a new plan's units are loaded and packed into batches. 1, in plans of earlier
versions: item after item. 2: in lanes, as `lanes_of` divides them. 3: in lanes, in the order of
their lengths (`reading_order`), and batches of short chunks are as long as those of full ones. It
changes the last digits of latents, so plan.json contains it, and a store is always continued in its
own order."""

_BYTES_PER_SECOND = 32_000  # estimate for audio of unknown length; part of the order, see PACKING
_UNKNOWN_SECONDS = 60.0

Numbered: TypeAlias = tuple[int, Item]  # an item and its number in the unit

T = TypeVar("T")


def reading_order(items: Sequence[Item], packing: int = PACKING) -> list[Item]:
    """The items in the order in which they are read, which is the order of their records.

    They are sorted by length, then by key; those of unknown length come last, by size, which in
    one format grows with the length. Items that share what is read (cells of a row group, segments
    of a remote recording) stay in the order of the plan, so that it is read only once.
    """
    if packing < 3 or any(map(shares_data, items)):
        return list(items)
    return sorted(items, key=_rank)


def shares_data(item: Item) -> bool:
    """Whether what is read of an item is read for others, too: a row group or remote recording."""
    remote_segment = item.segment is not None and is_remote(item.uri)
    return isinstance(item.place, TableCell) or remote_segment


def _rank(item: Item) -> tuple[bool, float, str]:
    seconds = known_seconds(item)
    return seconds is None, item.size if seconds is None else seconds, item.key


def lanes_of(items: Sequence[Item], packing: int = PACKING) -> list[list[Numbered]]:
    """Divide a unit's items: each one goes to the lane with the least audio so far.

    With packing 1 each item has a lane of its own, and they are taken one after the other.
    """
    if packing == 1:
        return [[numbered] for numbered in enumerate(items)]
    lanes: list[list[Numbered]] = [[] for _ in range(min(LANES, len(items)))]
    seconds = [0.0] * len(lanes)
    for number, item in enumerate(items):
        shortest = seconds.index(min(seconds))
        lanes[shortest].append((number, item))
        seconds[shortest] += _seconds(item)
    return lanes


def _seconds(item: Item) -> float:
    known = item.segment.duration if item.segment else None
    return known or item.seconds or item.size / _BYTES_PER_SECOND or _UNKNOWN_SECONDS


def in_turn(lanes: Iterable[Iterator[T]]) -> Iterator[T]:
    """Take one element from each iterator in turn, until all are exhausted."""
    turns = deque(lanes)
    while turns:
        lane = turns.popleft()
        for element in lane:
            yield element
            turns.append(lane)
            break
