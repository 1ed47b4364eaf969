"""Reads ranges of objects of S3, Google Cloud Storage and Azure with obstore.

It needs a tenth to a half of the CPU time of fsspec's clients (benchmarks/objects.py).

Callers give a file system of fsspec. Its client says how to connect: endpoint, region, credentials,
time limits. Where this cannot be carried over exactly, and for every answer but data, "no such
object" and transient errors, fsspec's client is used, so that both behave alike.

obstore's threads do not survive a fork: a process that was forked after the import of obstore uses
fsspec. Therefore obstore is imported by the first read, and only used where there are many reads.
"""

from __future__ import annotations

import asyncio
import os
import re
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from importlib.util import find_spec
from typing import Any

import fsspec
import fsspec.asyn
from fsspec.exceptions import FSTimeoutError

from latentmill.storage import hub, object_azure, object_gcs, object_s3
from latentmill.storage.object_client import OpenStore, UnsupportedError
from latentmill.storage.remote import TRANSIENT_STATUSES
from latentmill.text.log import get_logger

SWITCH = "LATENTMILL_OBSTORE"
"""The environment variable that disables obstore if it is `0`."""

IN_FLIGHT = 256  # most requests of one call at the same time

_log = get_logger("storage")
_lock = threading.Lock()
_BUCKETS = "_latentmill_buckets"  # attribute of a file system: what is known of its buckets

_LONGEST = 3600.0  # seconds, for a request whose caller sets no limit
_STATUS = re.compile(r"Server returned non-2xx status code: (\d{3})")
_CODE = re.compile(r"<Code>(\w{1,64})</Code>")


class ObjectError(OSError):
    """The server failed; `status` is its HTTP status."""

    def __init__(self, status: int, code: str) -> None:
        super().__init__(f"{code} (HTTP status {status})" if code else f"HTTP status {status}")
        self.status = status


class UnknownError(Exception):
    """obstore's answer is not reliable here: use that of fsspec's client."""


@dataclass(frozen=True)
class Kind:
    """A kind of object storage that obstore reads.

    Attributes:
        protocol: The protocol of its URLs in messages.
        client: The package that fsspec uses, which is imported when its file system exists.
        file_system: The class of the file system in `client`.
        opener: Opens a bucket: called with a file system and the bucket's name.
        same_api: Whether obstore sends requests of the API that `client` uses. If not, its listings
            have other versions, and an emulator that answers 404 may not know the API.
        offsets: Whether a listing can start after an object.
        ends_key: Text at which `client` cuts off a key, although obstore does not.
    """

    protocol: str
    client: str
    file_system: str
    opener: Callable[[Any, str], OpenStore]
    same_api: bool = True
    offsets: bool = True
    ends_key: str | None = None


KINDS = (
    Kind("s3", "s3fs", "S3FileSystem", object_s3.opener),
    # XML API and JSON API: for the first, the ETag of most objects is their MD5.
    Kind("gs", "gcsfs", "GCSFileSystem", object_gcs.opener, same_api=False),
    Kind(
        "az",
        "adlfs",
        "AzureBlobFileSystem",
        object_azure.opener,
        offsets=False,
        ends_key="?versionid=",
    ),
)


def kind_of(fs: fsspec.AbstractFileSystem) -> Kind | None:
    """The kind of object storage of a file system; None for others, and for subclasses of it."""
    for kind in KINDS:
        client = sys.modules.get(kind.client)
        if client is not None and type(fs) is getattr(client, kind.file_system, None):
            return kind
    return None


def cat_file(
    fs: fsspec.AbstractFileSystem, path: str, start: int, end: int, seconds: float | None = None
) -> bytes:
    """Like `fs.cat_file`, with a time limit if the file system is asynchronous."""
    place = _locate(fs, path)
    if place is not None:
        try:
            return place.read(start, end, seconds)
        except UnknownError:
            pass
    if fs.async_impl:
        data = fsspec.asyn.sync(fs.loop, fs._cat_file, path, start=start, end=end, timeout=seconds)
    else:
        data = fs.cat_file(path, start=start, end=end)
    if place is not None:
        place.bucket.give_up()
    return bytes(data)


def cat_ranges(
    fs: fsspec.AbstractFileSystem,
    paths: Sequence[str],
    starts: Sequence[int],
    ends: Sequence[int],
) -> list[Any]:
    """Like `fs.cat_ranges` with `on_error="return"`, with all requests at the same time."""
    places = [_locate(fs, path) for path in paths]
    found: list[Any] = [UnknownError()] * len(paths)
    if any(places):

        async def read_all() -> list[Any]:
            limit = asyncio.Semaphore(IN_FLIGHT)

            async def read(place: _Object | None, start: int, end: int) -> bytes:
                if place is None:
                    raise UnknownError
                async with limit:
                    return await place.read_async(start, end)

            reads = [read(*one) for one in zip(places, starts, ends, strict=True)]
            return await asyncio.gather(*reads, return_exceptions=True)

        found = fsspec.asyn.sync(fs.loop, read_all)
    rest = [number for number, data in enumerate(found) if isinstance(data, UnknownError)]
    if rest:
        columns: Iterator[Any] = ([column[n] for n in rest] for column in (paths, starts, ends))
        read = partial(fs.cat_ranges, on_error="return")
        if hub.is_hub(fs):
            read = partial(hub.cat_ranges, fs)
        for number, data in zip(rest, read(*columns), strict=True):
            found[number], place = data, places[number]
            if place is not None and not isinstance(data, BaseException):
                place.bucket.give_up()
    return found


class Bucket:
    """A bucket that obstore reads."""

    def __init__(self, kind: Kind, name: str, open_store: OpenStore) -> None:
        self.kind, self.name, self._open_store = kind, name, open_store
        self._stores: dict[float, Any] = {}
        self.answered = self.given_up = False

    def store(self, seconds: float | None) -> Any:
        """What reads it, with a time limit for each request."""
        seconds = seconds or _LONGEST
        if seconds not in self._stores:
            self._stores[seconds] = self._open_store(seconds)
        return self._stores[seconds]

    def give_up(self) -> None:
        """Use fsspec's client from now on, which has read what obstore could not read."""
        if not self.given_up:
            kind = self.kind
            text = "%s://%s is read with %s: obstore could not read it"
            _log.debug(text, kind.protocol, self.name, kind.client)
        self.given_up = True

    @contextmanager
    def errors(self, path: str) -> Iterator[None]:
        """Translate the errors of a request for `path`."""
        from obstore.exceptions import BaseError

        try:
            yield
        except (BaseError, OSError, ValueError) as error:
            raise self.translated(error, path) from None
        self.answered = True

    def translated(self, error: Exception, path: str) -> Exception:
        """The error that the callers expect for one of obstore, without its URL and headers."""
        if isinstance(error, FileNotFoundError):
            certain = self.answered or self.kind.same_api
            return FileNotFoundError(path) if certain else UnknownError()
        text = str(error)
        if (match := _STATUS.search(text)) is not None:
            status, code = int(match[1]), _CODE.search(text)
            if status in TRANSIENT_STATUSES:
                return ObjectError(status, code[1] if code else "")
        elif "HTTP error: " in text:
            if "kind: Timeout" in text:
                timeout: Exception = FSTimeoutError()  # as fsspec's own limit
                return timeout
            # Certificates that only one of the clients trusts, for example.
            if self.answered or "kind: Connect," not in text:
                return ConnectionError("the connection failed")
        return UnknownError()


@dataclass(frozen=True)
class _Object:
    bucket: Bucket
    key: str

    def read(self, start: int, end: int, seconds: float | None) -> bytes:
        """The bytes from `start` to before `end`; fewer at the end of the object."""
        import obstore

        with self.bucket.errors(self._path):
            store = self.bucket.store(seconds)
            # A thread that waits costs less than a coroutine in another one.
            return bytes(obstore.get_range(store, self.key, start=start, end=end))

    async def read_async(self, start: int, end: int) -> bytes:
        import obstore

        with self.bucket.errors(self._path):
            store = self.bucket.store(None)
            return bytes(await obstore.get_range_async(store, self.key, start=start, end=end))

    @property
    def _path(self) -> str:
        return f"{self.bucket.name}/{self.key}"


def _locate(fs: fsspec.AbstractFileSystem, path: str) -> _Object | None:
    """The object at a path, if obstore reads its bucket."""
    name, _, key = path.partition("/")
    # obstore has its own rules for other keys.
    if not key.isprintable() or any(part in ("", ".", "..") for part in key.split("/")):
        return None
    bucket = bucket_of(fs, name)
    if bucket is None or (bucket.kind.ends_key or "\0") in key:
        return None
    return _Object(bucket, key)


def bucket_of(fs: fsspec.AbstractFileSystem, name: str) -> Bucket | None:
    """A bucket of a file system, if obstore reads it."""
    kind = kind_of(fs)
    if kind is None or not _available():
        return None
    buckets: dict[str, Bucket | None] = vars(fs).setdefault(_BUCKETS, {})
    if name not in buckets:
        with _lock:
            if name not in buckets:
                buckets[name] = _open(kind, fs, name)
    bucket = buckets[name]
    return None if bucket is None or bucket.given_up else bucket


def _available() -> bool:
    return not _forked and os.environ.get(SWITCH) != "0" and _installed()


@cache
def _installed() -> bool:
    return find_spec("obstore") is not None


_forked = False  # after the import of obstore


def _after_fork() -> None:
    global _forked, _lock  # noqa: PLW0603
    _lock = threading.Lock()  # a thread of the parent may have held it
    _forked = _forked or "obstore" in sys.modules


os.register_at_fork(after_in_child=_after_fork)


def _open(kind: Kind, fs: Any, bucket: str) -> Bucket | None:
    """Open a bucket with the configuration of a client, or log why this is impossible."""
    try:
        open_store = kind.opener(fs, bucket)
    except UnsupportedError as reason:
        text = "%s://%s is read with %s: obstore does not support %s"
        _log.debug(text, kind.protocol, bucket, kind.client, reason)
        return None
    _log.debug("%s://%s is read with obstore", kind.protocol, bucket)
    return Bucket(kind, bucket, open_store)
