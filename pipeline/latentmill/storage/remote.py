"""What all storage has in common: opening a URL, its errors, and which of them pass.

Sources, recordings and stores are reached through fsspec. Credentials come from where each
service's own tools look for them; a URL that carries one is refused, or shown without it.
"""

from __future__ import annotations

import errno
import random
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import fsspec

from latentmill.errors import LatentmillError
from latentmill.text.redact import redact, redact_text

T = TypeVar("T")

# The extra of latentmill that brings a protocol's package.
EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs", "http": "http", "https": "http"}
EXTRAS |= dict.fromkeys(("az", "abfs", "abfss", "adl"), "azure")

# What storage clients raise that need be no OSError, by module.
CLIENT_ERRORS = (
    ("aiohttp", "ClientError"),
    ("botocore.exceptions", "BotoCoreError"),
    ("botocore.exceptions", "ClientError"),
    ("gcsfs.retry", "HttpError"),
    ("google.auth.exceptions", "GoogleAuthError"),
    ("azure.core.exceptions", "AzureError"),
    ("httpx", "HTTPError"),
    ("httpx2", "HTTPError"),
)

# Of these, and of OSError: a connection that could not be made, or was cut.
PASSING_ERRORS = (
    ("aiohttp", "ClientConnectionError"),
    ("aiohttp", "ClientPayloadError"),
    ("botocore.exceptions", "ConnectionError"),
    ("botocore.exceptions", "HTTPClientError"),
    ("botocore.exceptions", "IncompleteReadError"),
    ("botocore.exceptions", "ResponseStreamingError"),
    ("botocore.parsers", "ResponseParserError"),
    ("google.auth.exceptions", "TransportError"),
    ("azure.core.exceptions", "ServiceRequestError"),
    ("azure.core.exceptions", "ServiceResponseError"),
    ("requests.exceptions", "ConnectionError"),
    ("requests.exceptions", "Timeout"),
    ("requests.exceptions", "ChunkedEncodingError"),
    ("httpx", "TransportError"),
    ("httpx2", "TransportError"),
)
PASSING_STATUSES = frozenset({408, 409, 425, 429, 500, 502, 503, 504})
RANGE_NOT_SATISFIABLE = 416
PASSING_ERRNOS = frozenset(
    # The last two are what s3fs makes of the statuses 503 and 500.
    {errno.ETIMEDOUT, errno.ENETUNREACH, errno.EHOSTUNREACH, errno.EBUSY, errno.EREMOTEIO}
)

MAX_ATTEMPTS = 7
FIRST_PAUSE = 0.25  # seconds, doubled after every attempt
GIVE_UP_SECONDS = 120.0  # no new attempt later than this; the clients' own retries take time too

S3_CONNECTIONS = 256  # at most; botocore's default of 10 would make a batch wait in line

CONNECT_SECONDS = 30.0
READ_SECONDS = 60.0  # without a byte


def open_filesystem(url: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """fsspec's file system for a URL, and the path in it; requests have time limits.

    Raises:
        ValueError: There is no such protocol.
        ImportError: Its package is not installed.
    """
    options: dict[str, Any] = {}
    if protocol_of(url) in ("s3", "s3a"):
        given = fsspec.config.conf.get(protocol_of(url), {}).get("config_kwargs", {})
        options = {"config_kwargs": {"max_pool_connections": S3_CONNECTIONS, **given}}
    if _is_web(url):
        import aiohttp

        # By default a download ends after five minutes, and silence is waited out as long.
        timeout = aiohttp.ClientTimeout(None, sock_connect=CONNECT_SECONDS, sock_read=READ_SECONDS)
        given = fsspec.config.conf.get(protocol_of(url), {}).get("client_kwargs", {})
        options = {"client_kwargs": {"timeout": timeout, **given}}
    # A name may hold two colons; fsspec would take it for a chain of URLs, which nobody asks for.
    fs, path = fsspec.core.url_to_fs(url.partition("::")[0], **options)
    return fs, str(fs._strip_protocol(url)) if "::" in url else path


def protocol_of(url: str) -> str:
    """`s3`, `https`, ...; `file` for a path."""
    protocol, separator, _ = url.partition("://")
    return protocol.lower() if separator else "file"


def storage_errors(*others: type[Exception]) -> tuple[type[Exception], ...]:
    """What reading and writing may raise, by the clients that are imported now, and `others`."""
    return (OSError, *_loaded(CLIENT_ERRORS), *others)


def is_transient(error: BaseException) -> bool:
    """Whether an error may pass: a timeout, a cut connection, a busy or failing server.

    Anything else will be the same the next time: no such file or bucket, no permission, no space.
    """
    passing: tuple[type[Exception], ...] = (
        ConnectionError,
        TimeoutError,
        *_loaded(PASSING_ERRORS),
    )
    for one in _chain(error):  # what the client says counts before what it made that of
        status = _own_status(one)
        if status is not None:
            return status in PASSING_STATUSES
        if isinstance(one, passing) or (isinstance(one, OSError) and one.errno in PASSING_ERRNOS):
            return True
    return False


def status_of(error: BaseException | None) -> int | None:
    """The HTTP status that a client's error stands for, its causes included; None if unknown."""
    return next((s for one in _chain(error) if (s := _own_status(one)) is not None), None)


def is_missing(error: BaseException) -> bool:
    """Whether an error says that there is no such file.

    fsspec's http raises FileNotFoundError where a server fails, refuses or is not there, too.
    """
    missing = isinstance(error, FileNotFoundError | NotADirectoryError)
    return missing and not is_transient(error) and status_of(error) in (None, 404, 410)


def _own_status(error: BaseException) -> int | None:
    response = getattr(error, "response", None)
    if isinstance(response, dict):  # botocore
        response = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    else:
        response = getattr(response, "status_code", None)
    for status in (response, *(getattr(error, name, None) for name in _STATUS_NAMES)):
        if isinstance(status, int) and 100 <= status < 600:
            return status
    return None


_STATUS_NAMES = ("status", "status_code", "code")  # aiohttp, azure, gcsfs


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error and its causes."""
    while error is not None:
        yield error
        error = error.__cause__


def retrying(call: Callable[[], T]) -> T:
    """Call, and call again while it fails with an error that may pass; the last one is raised."""
    began = time.monotonic()
    for attempt in range(1, MAX_ATTEMPTS):
        try:
            return call()
        except storage_errors() as error:
            if not is_transient(error) or time.monotonic() - began > GIVE_UP_SECONDS:
                raise
        # Jitter, so that workers which failed together do not come back together.
        time.sleep(random.uniform(0.5, 1.0) * FIRST_PAUSE * 2 ** (attempt - 1))
    return call()


def cause_of(error: Exception) -> str:
    """Why reading or writing failed, in a few words, without secrets."""
    if isinstance(error, FileNotFoundError) and not error.strerror and "/" in str(error):
        if isinstance(error.__cause__, Exception) and not is_missing(error):
            return cause_of(error.__cause__)
        return "no such file"  # fsspec gives the path alone
    text = (error.strerror if isinstance(error, OSError) else None) or str(error)
    return redact_text(" ".join(text.split()).rstrip(".")) or type(error).__name__


def advice_on(error: Exception) -> str:
    """What to do about a failed write, as the end of a sentence, where that is known."""
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    return "; make room, then run the same command again" if full else ""


def why_not_opened(url: str, error: Exception) -> str:
    """Why fsspec refuses a URL, and what to install where a package is missing."""
    extra = EXTRAS.get(protocol_of(url))
    if isinstance(error, ImportError) and extra is not None:
        return f"a package is missing; pip install 'latentmill[{extra}]'"
    return cause_of(error)


def refuse_secrets(what: str, url: str, error: type[LatentmillError]) -> None:
    """Refuse a URL that carries credentials: the store would record them, and others read it.

    Raises:
        error: It does.
    """
    shown = redact(url)
    if shown != url:
        raise error(
            f"{what} {shown} carries credentials, or what may be some (***): take them out and put "
            "them where the service's own tools look for them (docs/storage.md)."
        )


def _is_web(url: str) -> bool:
    return protocol_of(url) in ("http", "https")


def _loaded(names: tuple[tuple[str, str], ...]) -> tuple[type[Exception], ...]:
    """The classes of those modules that are imported."""
    found = [getattr(sys.modules.get(module), name, None) for module, name in names]
    return tuple(one for one in found if one is not None)
