"""Reads the headers of items whose length is unknown, many at a time."""

from __future__ import annotations

import dataclasses
import itertools
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from latentmill.audio import AudioInfo, MediaFile, media_from_bytes, probe
from latentmill.audio.media import is_remote
from latentmill.audio.mp4 import read_tables
from latentmill.errors import ItemError
from latentmill.sources.base import ByteRange, Item, TableCell, known_seconds
from latentmill.sources.files import read_bytes
from latentmill.sources.reading import UnitReader, with_size
from latentmill.storage.remote import storage_errors

READERS = 16
REMOTE_READERS = 64  # each waits for a request most of the time
ENDS = 256 << 10
"""Number of bytes to fetch from each end of a long file, because headers are there."""


def probed(
    items: Iterable[Item],
    opened: Callable[[int], None] = lambda _: None,
    *,
    wanted: Callable[[Item], bool] = lambda _: True,
) -> Iterator[Item]:
    """Yield the items, with `seconds` from their headers if their length is unknown.

    A file that cannot be read keeps an unknown length; encoding it reports the error. `opened` is
    called with the number of headers read so far. Only headers of `wanted` items are read. Items
    may come out in another order.
    """
    count = 0
    stream = iter(items)
    first = next(stream, None)
    if first is None:
        return
    readers = REMOTE_READERS if is_remote(first.uri) else READERS
    stream = itertools.chain([first], stream)
    with ThreadPoolExecutor(readers, thread_name_prefix="probe") as pool:
        while batch := list(itertools.islice(stream, 8 * readers)):
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
    """Whether reading the header is cheap: a local file, and not a cell of a table."""
    return not is_remote(item.uri) and not isinstance(item.place, TableCell)


def _lengths(reader: UnitReader, item: Item) -> tuple[float | None, float | None]:
    """The exact length and the approximate length from the header; at least one is None."""
    try:
        info = _info(item, reader)
    except Exception:  # noqa: BLE001  encoding the item reports the error
        return None, None
    start = item.segment.start if item.segment is not None else 0.0
    if info.num_samples is not None:
        return max(0.0, info.num_samples / info.sample_rate - start), None
    if info.rough_seconds is not None:
        return None, max(0.0, info.rough_seconds - start)
    return None, None


def _info(item: Item, reader: UnitReader) -> AudioInfo:
    """Read a recording's header. Only the ends of a long remote file are fetched."""
    reader.check_container(item)
    if _read_whole(item):
        with reader.open(item) as media:
            return probe(media)
    with _ends(item) as media:
        info = probe(media)
        tables = read_tables(media) if info.format == "mp4" else None
    if tables and tables.fragmented and tables.end < _size(item) - ENDS:
        # More fragments are between the ends.
        return dataclasses.replace(info, num_samples=None, rough_seconds=None)
    return info


def _read_whole(item: Item) -> bool:
    if isinstance(item.place, ByteRange) and _size(item) > 2 * ENDS:
        return False  # reading it would copy the whole range
    short = _size(item) <= 2 * ENDS or isinstance(item.place, TableCell)
    return short or not is_remote(item.uri)


def _size(item: Item) -> int:
    return item.place.size if isinstance(item.place, ByteRange) else item.size


def _ends(item: Item) -> MediaFile:
    """A sparse file of the item's length with only its first and last bytes."""
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
