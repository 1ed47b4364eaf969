"""Reads ranges of S3 objects with obstore.

It needs a tenth to a half of the CPU time of s3fs (benchmarks/objects.py).

Callers give a file system of fsspec. The client that s3fs has made for it says how to connect:
endpoint, region, credentials, time limits. Where this cannot be carried over exactly, and for every
answer but data, "no such object" and transient errors, s3fs is used, so that both behave alike.

obstore's threads do not survive a fork: a process that was forked after the import of obstore uses
s3fs. Therefore obstore is imported by the first read, and used where there are many reads.
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
from datetime import UTC, datetime, timedelta
from functools import cache, partial
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit
from urllib.request import getproxies

import fsspec
import fsspec.asyn
from fsspec.exceptions import FSTimeoutError

from latentmill.storage import hub
from latentmill.storage.remote import TRANSIENT_STATUSES
from latentmill.text.log import get_logger

if TYPE_CHECKING:
    from obstore.store import S3Credential

SWITCH = "LATENTMILL_OBSTORE"
"""The environment variable that disables obstore if it is `0`."""

IN_FLIGHT = 256  # most requests of one call at the same time

_log = get_logger("storage")
_lock = threading.Lock()
_BUCKETS = "_latentmill_buckets"  # attribute of a file system: what is known of its buckets

_LONGEST = 3600.0  # seconds, for a request whose caller sets no limit
# obstore asks again five minutes before the end; botocore keeps credentials valid for ten minutes.
_CREDENTIALS_LAST = timedelta(minutes=8)

_AWS = re.compile(r"https://s3(\.[a-z]{2}(-[a-z]+)+-\d)?\.amazonaws\.com(\.cn)?/?")
_BUCKET = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")
_STATUS = re.compile(r"Server returned non-2xx status code: (\d{3})")
_CODE = re.compile(r"<Code>(\w{1,64})</Code>")


class ObjectError(OSError):
    """The server failed; `status` is its HTTP status."""

    def __init__(self, status: int, code: str) -> None:
        super().__init__(f"{code} (HTTP status {status})" if code else f"HTTP status {status}")
        self.status = status


class UnknownError(Exception):
    """s3fs must be asked."""


class _Unsupported(Exception):  # noqa: N818  a reason for s3fs
    """The configuration of s3fs cannot be carried over."""


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

    def __init__(self, name: str, open_store: Callable[[float], Any]) -> None:
        self.name, self._open_store = name, open_store
        self._stores: dict[float, Any] = {}
        self.answered = self.given_up = False

    def store(self, seconds: float | None) -> Any:
        """What reads it, with a time limit for each request."""
        seconds = seconds or _LONGEST
        if seconds not in self._stores:
            self._stores[seconds] = self._open_store(seconds)
        return self._stores[seconds]

    def give_up(self) -> None:
        """Use s3fs from now on, which has read what obstore could not read."""
        if not self.given_up:
            _log.debug("s3://%s is read with s3fs: obstore could not read it", self.name)
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
            return FileNotFoundError(path)
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

        store = self.bucket.store(seconds)
        with self.bucket.errors(
            self._path
        ):  # a thread that waits costs less than a coroutine in another one
            return bytes(obstore.get_range(store, self.key, start=start, end=end))

    async def read_async(self, start: int, end: int) -> bytes:
        import obstore

        store = self.bucket.store(None)
        with self.bucket.errors(self._path):
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
    return None if bucket is None else _Object(bucket, key)


def bucket_of(fs: fsspec.AbstractFileSystem, name: str) -> Bucket | None:
    """A bucket of a file system, if obstore reads it."""
    s3fs = sys.modules.get("s3fs")
    if s3fs is None or type(fs) is not s3fs.S3FileSystem or not _available():
        return None
    buckets: dict[str, Bucket | None] = vars(fs).setdefault(_BUCKETS, {})
    if name not in buckets:
        with _lock:
            if name not in buckets:
                buckets[name] = _open(fs, name)
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


def _open(fs: Any, bucket: str) -> Bucket | None:
    """Open a bucket with the configuration of s3fs, or log why this is impossible."""
    try:
        open_store = _opener(fs, bucket)
    except _Unsupported as reason:
        _log.debug("s3://%s is read with s3fs: obstore does not support %s", bucket, reason)
        return None
    _log.debug("s3://%s is read with obstore", bucket)
    return Bucket(bucket, open_store)


def _opener(fs: Any, bucket: str) -> Callable[[float], Any]:
    """What opens a bucket, with a time limit for each request."""
    from botocore import UNSIGNED
    from obstore.store import S3Store

    client = fs.s3  # connects, with the errors of s3fs
    config, anonymous = client.meta.config, client.meta.config.signature_version is UNSIGNED
    endpoint, virtual = _endpoint(client, bucket)
    _refuse(
        {
            "this bucket's name": not _BUCKET.fullmatch(bucket) or "--" in bucket,
            "version_aware": fs.version_aware,
            "cache_regions": fs.cache_regions,
            "s3_additional_kwargs": fs.s3_additional_kwargs,
            "a session": not fs._session_is_owned,
            "this signature version": not anonymous and config.signature_version != "s3v4",
            "these options for S3": set(config.s3 or ()) - {"addressing_style"},
            "FIPS or dual-stack endpoints": config.use_fips_endpoint
            or config.use_dualstack_endpoint,
            "a client certificate": config.client_cert,
            "these connector_args": set(config.connector_args or ())
            - {"keepalive_timeout", "limit", "use_dns_cache", "force_close"},
            "proxies": config.proxies or _has_proxy(urlsplit(endpoint).scheme),
        }
    )
    provider = None if anonymous else _provider(client, fs.loop)

    def open_store(seconds: float) -> Any:
        return S3Store(
            # All of them are given, because obstore would take others from the environment.
            config={
                "bucket": bucket,
                "region": client.meta.region_name.replace("aws-global", "us-east-1"),
                "aws_endpoint_url_s3": endpoint,
                "virtual_hosted_style_request": virtual,
                "skip_signature": anonymous,
                "request_payer": fs.requester_pays,
                "s3_express": False,
            },
            client_options={
                "allow_http": endpoint.startswith("http://"),
                "connect_timeout": timedelta(seconds=config.connect_timeout),
                "read_timeout": timedelta(seconds=config.read_timeout),
                "timeout": timedelta(seconds=seconds),
            },
            retry_config={"max_retries": 0},  # `retrying` retries
            credential_provider=provider,
        )

    return open_store


def _endpoint(client: Any, bucket: str) -> tuple[str, bool]:
    """The URL to which the client sends requests, and whether it contains the bucket's name."""
    url, style = client.meta.endpoint_url, (client.meta.config.s3 or {}).get("addressing_style")
    parts = urlsplit(url)
    verify = getattr(client._endpoint.http_session, "_verify", None)
    _refuse(
        {
            "an endpoint with a path": parts.path not in ("", "/") or parts.query,
            "other certificates": parts.scheme != "http" and verify is not True,
        }
    )
    if _AWS.fullmatch(url):
        if style != "path" and "." not in bucket:
            return f"https://{bucket}.{parts.netloc}", True
    else:
        _refuse({"addressing style virtual": style == "virtual"})
    return f"{parts.scheme}://{parts.netloc}", False


def _refuse(unsupported: dict[str, Any]) -> None:
    for name, found in unsupported.items():
        if found:
            raise _Unsupported(name)


def _has_proxy(scheme: str) -> bool:
    return bool(getproxies().keys() & {scheme, "all"})


def _provider(client: Any, loop: asyncio.AbstractEventLoop) -> Callable[[], S3Credential]:
    """Ask botocore for credentials, which looks in all places and refreshes them."""
    credentials: Any = getattr(getattr(client, "_request_signer", None), "_credentials", None)
    if credentials is None:
        raise _Unsupported("missing credentials")

    def provide() -> S3Credential:  # called in a thread of obstore
        asked = asyncio.run_coroutine_threadsafe(credentials.get_frozen_credentials(), loop)
        frozen = asked.result()
        return {
            "access_key_id": frozen.access_key,
            "secret_access_key": frozen.secret_key,
            "token": frozen.token,
            "expires_at": datetime.now(UTC) + _CREDENTIALS_LAST,
        }

    return provide
