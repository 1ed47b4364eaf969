"""Opens the bytes of a unit's items: files, members of tars, and cells of tables."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable

import pyarrow as pa

from latentmill.audio.fetch import local_file
from latentmill.audio.media import MediaFile, is_remote, media_from_bytes, open_media
from latentmill.audio.pieces import Helpers
from latentmill.errors import ItemError
from latentmill.sources.base import ByteRange, Item, TableCell
from latentmill.sources.files import current_version, read_bytes
from latentmill.sources.parquet_cells import CellReader
from latentmill.sources.prefetch import LARGEST, Prefetch
from latentmill.storage.closeable import Closeable
from latentmill.storage.descriptors import write_at
from latentmill.storage.outages import ItemRetries
from latentmill.storage.remote import cause_of, own_limits, storage_errors

_PIECE = 16 << 20
_SHARED_RECORDINGS = 16
"""Maximum fetched recordings that are kept for their segments: as many as a unit has lanes, which
advance at different speeds."""


class UnitReader(Closeable):
    """Opens the audio of a unit's items for the unit's load threads. Thread-safe; `close` it.

    Data that several items share is read once: the remote recording of segments, and the row group
    of cells. Small remote recordings are prefetched. `items` are in the order in which they will
    be opened. `allow_changed` accepts whole files that have changed since planning, but not those
    of the items with the keys `unchanged`. A tar or table must never have changed, because the
    position of an item can now be that of another one. Readers that share `versions` look each tar
    or table up once together. `on_bytes` is called, in any thread, whenever bytes have arrived.
    `helpers` are threads that may load pieces of a long recording.
    """

    helpers: Helpers | None = None

    def __init__(
        self,
        items: Iterable[Item],
        *,
        allow_changed: bool = False,
        unchanged: Collection[str] = (),
        versions: dict[str, tuple[int, str]] | None = None,
        on_bytes: Callable[[], object] = lambda: None,
    ) -> None:
        items = list(items)
        self._on_bytes = on_bytes
        self._cells = CellReader(items, on_bytes)
        self._allow_changed = allow_changed
        self._unchanged = unchanged
        self._lock = threading.Lock()
        self._locks: dict[str, threading.Lock] = {}
        self._versions = {} if versions is None else versions
        self._hashes: dict[str, str] = {}
        self._recordings: OrderedDict[str, MediaFile] = OrderedDict()
        self._segments: dict[str, set[str]] = {}  # keys that are not released yet, by recording
        for item in items:
            if _is_shared(item):
                self._segments.setdefault(item.uri, set()).add(item.key)
        self._prefetch = Prefetch(items, self._open, self._fetch)

    def open(self, item: Item) -> MediaFile:
        """Open an item's recording; for a segment, the whole recording.

        Raises ItemError if it is missing, unreadable, or has changed since planning, and
        StorageError if this machine has no space for it.
        """
        with own_limits():
            return self._prefetch.open(item)

    def release(self, item: Item) -> None:
        """Free what was read early of an item that needs no more reading."""
        self._prefetch.release(item)
        if isinstance(item.place, TableCell):
            self._cells.release(item.uri, item.place)
        if _is_shared(item):
            with self._lock:
                left = self._segments.get(item.uri, set())
                left.discard(item.key)
                if not left and item.uri in self._recordings:
                    self._recordings.pop(item.uri).close()

    def _open(self, item: Item) -> MediaFile:
        self.check_container(item)
        if isinstance(item.place, ByteRange):
            return _open_range(item.uri, item.place, self._on_bytes)
        if isinstance(item.place, TableCell):
            try:
                data = self._cells.read(item.uri, item.place)
            except (*storage_errors(), pa.ArrowException) as error:
                raise ItemError(f"the table cannot be read: {cause_of(error)}") from error
            return media_from_bytes(data)
        media = self._shared(item) if _is_shared(item) else self._opened(item)
        if not self._allow_changed or item.key in self._unchanged:
            with contextlib.ExitStack() as stack:
                stack.enter_context(media)
                _check_unchanged(item, media)
                stack.pop_all()
        return media

    def _fetch(self, item: Item) -> MediaFile | None:
        """Open a recording early; None if it turns out to be large."""
        item = with_size(item)
        return None if item.size > LARGEST else self._open(item)

    def check_container(self, item: Item) -> None:
        """Raise ItemError if the item's tar or table has changed since it was listed.

        Each file is looked up once.
        """
        if item.place is None or not item.version:
            return
        with self._lock_of(item.uri):
            try:
                if item.uri not in self._versions:
                    self._versions[item.uri] = current_version(item.uri, ItemRetries(item.uri))
            except storage_errors(ValueError) as error:
                raise ItemError(f"its file cannot be read: {cause_of(error)}") from error
        if self._versions[item.uri][1] != item.version:
            container = "tar" if isinstance(item.place, ByteRange) else "table"
            raise ItemError(
                f"its {container} has changed since it was listed: `encode --extend "
                "--retry-changed` lists it again (items that were removed from it stay as they are)"
            )

    def content_hash(self, item: Item, media: MediaFile) -> str:
        """The hash of the item's encoded bytes; for a segment, of the whole recording."""
        if item.segment is None:
            return media.content_hash
        with self._lock_of(item.uri):
            if item.uri not in self._hashes:
                self._hashes[item.uri] = media.content_hash
            return self._hashes[item.uri]

    def stop(self) -> None:
        """Prefetch no more recordings."""
        self._prefetch.stop()

    def close(self) -> None:
        """Close shared recordings and those that were prefetched but not opened."""
        self._prefetch.close()
        self._cells.close()
        with self._lock:
            while self._recordings:
                self._recordings.popitem()[1].close()

    def _shared(self, item: Item) -> MediaFile:
        """A remote recording, which is kept until its last segment is released.

        If there are too many, the one that was not used for the longest time is closed.
        """
        uri = item.uri
        with self._lock_of(uri):
            with self._lock:
                known = self._recordings.get(uri)
                if known is not None:
                    self._recordings.move_to_end(uri)
                    return known.reopened()
            fetched = self._opened(item)
            with self._lock:
                self._recordings[uri] = fetched
                while len(self._recordings) > _SHARED_RECORDINGS:
                    self._recordings.popitem(last=False)[1].close()
                return fetched.reopened()

    def _opened(self, item: Item) -> MediaFile:
        return open_media(item.uri, item.size or None, self._on_bytes)

    def _lock_of(self, uri: str) -> threading.Lock:
        with self._lock:
            return self._locks.setdefault(uri, threading.Lock())


def _is_shared(item: Item) -> bool:
    """Whether an item is a segment of a remote recording."""
    return item.segment is not None and item.place is None and is_remote(item.uri)


def with_size(item: Item) -> Item:
    """The item with the size of its file, if its source (such as a manifest) has not set it."""
    if item.size or item.place is not None or not is_remote(item.uri):
        return item
    try:
        return dataclasses.replace(item, size=current_version(item.uri)[0])
    except storage_errors(ValueError):
        return item  # opening it will raise the error


def _check_unchanged(item: Item, media: MediaFile) -> None:
    """Refuse a file that has changed since it was listed.

    A listing without size and version (a dangling link, a manifest, some web servers) allows no
    check. For a fetched file only the size is compared: its version would need another request.
    """
    if not item.size and not item.version:
        return
    if media.size != item.size:
        raise ItemError(
            f"changed since the plan was made ({item.size} bytes then, {media.size} now)"
        )
    local = item.uri.startswith("/")
    if local and item.version and item.version != str(os.fstat(media.fileno()).st_mtime_ns):
        raise ItemError("changed since the plan was made (same size, new modification time)")


def _open_range(uri: str, place: ByteRange, on_bytes: Callable[[], object]) -> MediaFile:
    """A range of bytes of a file, in memory; a large one in an unlinked temporary file."""
    try:
        media = _copy(uri, place, on_bytes)
    except storage_errors(ValueError) as error:
        raise ItemError(f"its file cannot be read: {cause_of(error)}") from error
    if media.size != place.size:
        size = media.size
        media.close()
        if size > place.size:
            raise ItemError("its server does not support ranges: it returned the whole file")
        raise ItemError(
            f"its file is truncated or its header is wrong: only {size} of {place.size} bytes exist"
        )
    return media


def _copy(uri: str, place: ByteRange, on_bytes: Callable[[], object]) -> MediaFile:
    retries = ItemRetries(uri, on_bytes)
    with contextlib.ExitStack() as undo:
        target = undo.enter_context(local_file(place.size))
        end = place.offset + place.size
        for start in range(place.offset, end, _PIECE):
            size = min(_PIECE, end - start)
            piece = read_bytes(uri, start, start + size, retries)
            write_at(target.fileno(), piece, start - place.offset)
            retries.progress()
            if len(piece) != size:  # the file ends, or its server has returned all of it
                break
        undo.pop_all()
    return MediaFile(target)
