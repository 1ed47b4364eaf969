"""Reading the headers of items whose length nobody knows, many at a time."""

from __future__ import annotations

import dataclasses
import itertools
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from latentmill.audio import AudioInfo, MediaFile, media_from_bytes, probe
from latentmill.audio.media import is_remote
from latentmill.errors import ItemError
from latentmill.plan.items import known_seconds
from latentmill.sources.base import ByteRange, Item, TableCell
from latentmill.sources.files import read_bytes
from latentmill.sources.reading import UnitReader, with_size
from latentmill.storage.remote import storage_errors

READERS = 16
BATCH = 8 * READERS
ENDS = 256 << 10
"""Bytes that are fetched of either end of a longer file: that is where headers are."""


def probed(
    items: Iterable[Item],
    opened: Callable[[int], None] = lambda _: None,
    *,
    wanted: Callable[[Item], bool] = lambda _: True,
) -> Iterator[Item]:
    """The same items, with `seconds` where their header says it; known lengths are not looked up.

    A file that cannot be read keeps an unknown length: encoding it will say what is wrong.

    Args:
        items: Items in any order.
        opened: Is told how many headers were read so far.
        wanted: Which items may be looked up.
    """
    count = 0
    stream = iter(items)
    with ThreadPoolExecutor(READERS, thread_name_prefix="probe") as pool:
        while batch := list(itertools.islice(stream, BATCH)):
            unknown = []
            for item in batch:
                if known_seconds(item) is None and wanted(item):
                    unknown.append(item)
                else:
                    yield item
            sized = list(pool.map(with_size, unknown))
            with UnitReader(filter(_read_whole, sized), allow_changed=True) as reader:
                found = pool.map(partial(_lengths, reader), sized)
                for item, (seconds, estimate) in zip(unknown, found, strict=True):
                    yield dataclasses.replace(item, seconds=seconds, estimate=estimate)
            count += len(unknown)
            opened(count)


def cheap(item: Item) -> bool:
    """Whether a header lies on this machine's disk, and not in a table, which must be decoded."""
    return not is_remote(item.uri) and not isinstance(item.place, TableCell)


def _lengths(reader: UnitReader, item: Item) -> tuple[float | None, float | None]:
    """The item's length as its header says it exactly; or roughly."""
    try:
        info = _info(item, reader)
    except ItemError:
        return None, None
    start = item.segment.start if item.segment is not None else 0.0
    if info.num_samples is not None:
        return max(0.0, info.num_samples / info.sample_rate - start), None
    if info.rough_seconds is not None:
        return None, max(0.0, info.rough_seconds - start)
    return None, None


def _info(item: Item, reader: UnitReader) -> AudioInfo:
    """What a recording's header says; of a long one elsewhere only the ends are fetched."""
    with reader.open(item) if _read_whole(item) else _ends(item) as media:
        return probe(media)


def _read_whole(item: Item) -> bool:
    if isinstance(item.place, ByteRange) and _size(item) > 2 * ENDS:
        return False  # it would be copied
    short = _size(item) <= 2 * ENDS or isinstance(item.place, TableCell)
    return short or not is_remote(item.uri)


def _size(item: Item) -> int:
    return item.place.size if isinstance(item.place, ByteRange) else item.size


def _ends(item: Item) -> MediaFile:
    """A file of the item's length that has its first and last bytes, and a hole between."""
    size = _size(item)
    start = item.place.offset if isinstance(item.place, ByteRange) else 0
    end = start + size
    try:
        first = read_bytes(item.uri, start, start + ENDS)
        last = read_bytes(item.uri, end - ENDS, end)
    except storage_errors() as error:
        raise ItemError("its header cannot be read") from error
    media = media_from_bytes(first)
    os.pwrite(media.fileno(), last, size - len(last))
    media.size = size
    return media
