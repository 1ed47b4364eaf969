"""The bytes of a unit's items, wherever they lie: files, members of tars, cells of tables."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import tempfile
import threading
from collections import OrderedDict
from collections.abc import Iterable
from pathlib import Path

import pyarrow as pa

from latentmill.audio.fetch import MEMORY_LIMIT
from latentmill.audio.media import MediaFile, is_remote, media_from_bytes, open_media
from latentmill.errors import ItemError
from latentmill.sources.base import ByteRange, Item, TableCell
from latentmill.sources.files import current_version, read_bytes
from latentmill.sources.parquet_cells import CellReader
from latentmill.sources.prefetch import LARGEST, Prefetch
from latentmill.storage.closeable import Closeable
from latentmill.storage.remote import cause_of, storage_errors

_PIECE = 16 << 20
_SHARED_RECORDINGS = 2  # fetched recordings that are kept while their segments are read


class UnitReader(Closeable):
    """Opens the audio of a unit's items for the unit's decode threads. Thread-safe; `close` it.

    What several items share is read once: the fetched recording that segments are parts of, and
    the row group that cells lie in. Small recordings from elsewhere are fetched ahead.

    Args:
        items: Of the unit, in the order in which they will be opened.
        allow_changed: Whether files may have changed since they were planned.
    """

    def __init__(self, items: Iterable[Item], *, allow_changed: bool = False) -> None:
        items = list(items)
        self._cells = CellReader(items)
        self._allow_changed = allow_changed
        self._lock = threading.Lock()
        self._locks: dict[str, threading.Lock] = {}
        self._versions: dict[str, tuple[int, str]] = {}
        self._hashes: dict[str, str] = {}
        self._recordings: OrderedDict[str, MediaFile] = OrderedDict()
        self._ahead = Prefetch(items, self._open, self._fetch)

    def open(self, item: Item) -> MediaFile:
        """The bytes of an item's recording: all of it, where the item is a segment.

        Raises:
            ItemError: It is missing, cannot be read, or has changed since it was planned.
        """
        return self._ahead.open(item)

    def let_go(self, item: Item) -> None:
        """The item is over, opened or not."""
        self._ahead.let_go(item)

    def _open(self, item: Item) -> MediaFile:
        if item.place is not None and not self._allow_changed:
            self._check_container(item)
        if isinstance(item.place, ByteRange):
            return _open_range(item.uri, item.place)
        if isinstance(item.place, TableCell):
            return media_from_bytes(self._cell(item.uri, item.place))
        if item.segment is not None and is_remote(item.uri):
            media = self._shared(item)
        else:
            media = open_media(item.uri, item.size or None)
        if not self._allow_changed:
            with contextlib.ExitStack() as stack:
                stack.enter_context(media)
                _check_unchanged(item, media)
                stack.pop_all()
        return media

    def _fetch(self, item: Item) -> MediaFile | None:
        """The bytes of a recording that nobody asks for yet; None of one that is long after all."""
        item = with_size(item)
        return None if item.size > LARGEST else self._open(item)

    def content_hash(self, item: Item, media: MediaFile) -> str:
        """The hash of the item's encoded bytes; of a segment, those of the whole recording."""
        if item.segment is None:
            return media.content_hash
        with self._lock_of(item.uri):
            if item.uri not in self._hashes:
                self._hashes[item.uri] = media.content_hash
            return self._hashes[item.uri]

    def stop(self) -> None:
        """Fetch nothing more ahead."""
        self._ahead.stop()

    def close(self) -> None:
        """Close what is shared, and what was fetched and not opened."""
        self._ahead.close()
        self._cells.close()
        with self._lock:
            while self._recordings:
                self._recordings.popitem()[1].close()

    def _cell(self, uri: str, cell: TableCell) -> bytes:
        try:
            return self._cells.read(uri, cell)
        except (*storage_errors(), pa.ArrowException) as error:
            raise ItemError(f"the table cannot be read: {cause_of(error)}") from error

    def _shared(self, item: Item) -> MediaFile:
        """A fetched recording, fetched once for all segments that follow each other."""
        uri = item.uri
        with self._lock_of(uri):
            with self._lock:
                known = self._recordings.get(uri)
                if known is not None:
                    return _again(known)
            fetched = open_media(uri, item.size or None)
            with self._lock:
                self._recordings[uri] = fetched
                while len(self._recordings) > _SHARED_RECORDINGS:
                    self._recordings.popitem(last=False)[1].close()
                return _again(fetched)

    def _lock_of(self, uri: str) -> threading.Lock:
        with self._lock:
            return self._locks.setdefault(uri, threading.Lock())

    def _check_container(self, item: Item) -> None:
        """Refuse a tar or a table that is not the one that was planned; asked once per unit."""
        if not item.version:
            return
        with self._lock_of(item.uri):
            try:
                if item.uri not in self._versions:
                    self._versions[item.uri] = current_version(item.uri)
            except storage_errors() as error:
                raise ItemError(f"its file cannot be read: {cause_of(error)}") from error
        if self._versions[item.uri][1] != item.version:
            raise ItemError("its file has changed since the plan was made")


def with_size(item: Item) -> Item:
    """The item with its file's size where its source, such as a manifest, did not give it."""
    if item.size or item.place is not None or not is_remote(item.uri):
        return item
    try:
        return dataclasses.replace(item, size=current_version(item.uri)[0])
    except storage_errors():
        return item  # opening it will say what is wrong


def _check_unchanged(item: Item, media: MediaFile) -> None:
    """Refuse a file that is not the one that was planned: what was listed is what is encoded.

    A listing that gave neither size nor version (a dangling link, a manifest, some web servers)
    promises nothing. A fetched file's version would cost one more request: there the size must do.
    """
    if not item.size and not item.version:
        return
    if media.size != item.size:
        raise ItemError(
            f"changed since the plan was made ({item.size} bytes then, {media.size} now)"
        )
    local = item.uri.startswith("/")
    if local and item.version and item.version != str(os.fstat(media.fileno()).st_mtime_ns):
        raise ItemError("changed since the plan was made (the same size, written anew)")


def _open_range(uri: str, place: ByteRange) -> MediaFile:
    """A run of bytes of a file; a long one goes to an unlinked temporary file."""
    try:
        if place.size <= MEMORY_LIMIT:
            media = media_from_bytes(read_bytes(uri, place.offset, place.offset + place.size))
        else:
            media = _copy(uri, place)
    except storage_errors() as error:
        raise ItemError(f"its file cannot be read: {cause_of(error)}") from error
    if media.size != place.size:
        size = media.size
        media.close()
        if size > place.size:
            raise ItemError("its server knows no ranges: it gave the whole file")
        raise ItemError(
            f"its file is cut off, or claims too much: {size} of {place.size} bytes are there"
        )
    return media


def _copy(uri: str, place: ByteRange) -> MediaFile:
    with contextlib.ExitStack() as undo:
        target = undo.enter_context(tempfile.TemporaryFile(buffering=0))
        end = place.offset + place.size
        for start in range(place.offset, end, _PIECE):
            piece = read_bytes(uri, start, min(start + _PIECE, end))
            target.write(piece)
            if not piece:
                break
        undo.pop_all()
    return MediaFile(target)


def _again(media: MediaFile) -> MediaFile:
    """The same bytes with a file position of their own."""
    try:
        return MediaFile(Path(f"/proc/self/fd/{media.fileno()}").open("rb", buffering=0))
    except OSError:  # not Linux
        return media_from_bytes(media.read_at(0, media.size))
