"""Shared by all storage: opening a URL, classifying its errors, and retrying.

Sources and stores are accessed through fsspec. Credentials come from where each service's own tools
look for them; a URL that contains credentials is rejected, or displayed without them.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import fsspec

from latentmill.errors import LatentmillError, StorageError
from latentmill.text.log import get_logger
from latentmill.text.redact import redact, redact_text

T = TypeVar("T")
_log = get_logger("storage")

# The extra of latentmill that installs a protocol's package.
EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs", "http": "http", "https": "http"}
EXTRAS |= dict.fromkeys(("az", "abfs", "abfss", "adl"), "azure")

NO_MORE_FILES = (errno.EMFILE, errno.ENFILE)  # of this process, or of this machine

# Errors of storage clients that may not be OSErrors: module and class.
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

# Those of them, and of OSError, for a connection that failed or was interrupted.
TRANSIENT_ERRORS = (
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
TRANSIENT_STATUSES = frozenset({408, 409, 425, 429, 500, 502, 503, 504})
RANGE_NOT_SATISFIABLE = 416
TRANSIENT_ERRNOS = frozenset(
    # s3fs raises the last two for the statuses 503 and 500.
    {errno.ETIMEDOUT, errno.ENETUNREACH, errno.EHOSTUNREACH, errno.EBUSY, errno.EREMOTEIO}
)

NO_SUCH_BUCKET = "there is no such bucket"

MAX_ATTEMPTS = 7
FIRST_PAUSE = 0.25  # seconds; doubles after every attempt
MOST_DOUBLINGS = 5
GIVE_UP_SECONDS = 120.0  # without progress, no new attempt: the clients' own retries take time, too

S3_CONNECTIONS = (
    256  # maximum; with botocore's default of 10, the requests of a batch would wait for each other
)

CONNECT_SECONDS = 30.0
READ_SECONDS = 60.0  # without receiving a byte


def open_filesystem(url: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """Return fsspec's file system for a URL, with timeouts, and the path in it.

    Raises ValueError if its protocol is unknown or lacks options, and ImportError if its package
    is not installed.
    """
    options: dict[str, Any] = {}
    if protocol_of(url) in ("s3", "s3a"):
        given = fsspec.config.conf.get(protocol_of(url), {}).get("config_kwargs", {})
        options = {"config_kwargs": {"max_pool_connections": S3_CONNECTIONS, **given}}
    if is_web(url):
        import aiohttp

        # By default, a download is cut off after five minutes, and a stalled one waits as long.
        timeout = aiohttp.ClientTimeout(None, sock_connect=CONNECT_SECONDS, sock_read=READ_SECONDS)
        given = fsspec.config.conf.get(protocol_of(url), {}).get("client_kwargs", {})
        options = {"client_kwargs": {"timeout": timeout, **given}}
    # A name may contain two colons, which fsspec would treat as a chain of URLs.
    try:
        fs, path = fsspec.core.url_to_fs(url.partition("::")[0], **options)
    except (AttributeError, KeyError, TypeError) as error:  # from the constructor
        raise ValueError(
            f"options of the protocol {protocol_of(url)} are missing or invalid; set them in "
            "fsspec's configuration, or copy the files to a disk or a bucket"
        ) from error
    return fs, str(fs._strip_protocol(url)) if "::" in url else path


def open_for(
    what: str, url: str, error: type[LatentmillError]
) -> tuple[fsspec.AbstractFileSystem, str]:
    """Open the file system of a source or a store, and return it with the path in it.

    Raises `error` if the URL is a chain, contains credentials or cannot be opened.
    """
    if "::" in url:
        raise error(f"{what} {redact(url)} is a chained URL: use a plain path or URL.")
    refuse_secrets(what, url, error)
    try:
        fs, path = open_filesystem(url)
    except (ValueError, ImportError, OSError) as cause:  # some, such as ftp, connect at once
        raise error(f"{what} {url} cannot be opened: {why_not_opened(url, cause)}.") from cause
    named = _account_host(url).partition(".")[0]
    # adlfs takes the account of a connection string instead.
    used = getattr(getattr(fs, "service_client", None), "account_name", None)
    if named and used and named != used:
        raise error(
            f"{what} {url} is in the storage account {named}, but the credentials are those of "
            f"{used}: change AZURE_STORAGE_CONNECTION_STRING or AZURE_STORAGE_ACCOUNT_NAME."
        )
    return fs, path


def address(fs: fsspec.AbstractFileSystem, path: str, opened: str) -> str:
    """A path of a remote file system as URL, with the storage account of the URL `opened`.

    A URL of Azure may name the account: `abfs://container@account.dfs.core.windows.net/path`.
    """
    if host := _account_host(opened):
        container, slash, key = path.partition("/")
        return f"{protocol_of(opened)}://{container}@{host}{slash}{key}"
    return str(fs.unstrip_protocol(path))


def _account_host(url: str) -> str:
    """The host in a URL of Azure, which begins with the storage account; empty if there is none."""
    if EXTRAS.get(protocol_of(url)) != "azure":
        return ""
    return url.partition("://")[2].partition("/")[0].partition("@")[2]


def is_web(url: str) -> bool:
    """Whether a URL is on a web server, which can be read only and lists no folders."""
    return protocol_of(url) in ("http", "https")


def protocol_of(url: str) -> str:
    """The protocol of a URL, such as `s3` or `https`; `file` for a path."""
    protocol, separator, _ = url.partition("://")
    return protocol.lower() if separator else "file"


def storage_errors(*others: type[Exception]) -> tuple[type[Exception], ...]:
    """The errors that reading and writing may raise with the imported clients, and `others`."""
    return (OSError, *_loaded(CLIENT_ERRORS), *others)


def is_transient(error: BaseException) -> bool:
    """Whether a retry may succeed: after a timeout, a lost connection, a busy or failing server.

    Other errors are permanent: no such file or bucket, no permission, no space.
    """
    transient: tuple[type[Exception], ...] = (
        ConnectionError,
        TimeoutError,
        *_loaded(TRANSIENT_ERRORS),
    )
    for one in _chain(error):  # the client's own error takes precedence over its cause
        status = _own_status(one)
        if status is not None:
            return status in TRANSIENT_STATUSES
        if isinstance(one, transient) or (
            isinstance(one, OSError) and one.errno in TRANSIENT_ERRNOS
        ):
            return True
    return False


def status_of(error: BaseException | None) -> int | None:
    """The HTTP status of a client's error or of one of its causes; None if there is none."""
    return next((s for one in _chain(error) if (s := _own_status(one)) is not None), None)


def is_missing(error: BaseException) -> bool:
    """Whether the file does not exist.

    fsspec's http also raises FileNotFoundError if a server fails, denies access or is unreachable.
    """
    missing = isinstance(error, FileNotFoundError | NotADirectoryError)
    return missing and not is_transient(error) and status_of(error) in (None, 404, 410)


def was_removed(error: BaseException | None) -> bool:
    """Whether a file does not exist, or another NFS client has removed it while it was open."""
    stale = isinstance(error, OSError) and error.errno == errno.ESTALE
    return stale or isinstance(error, FileNotFoundError)


def _own_status(error: BaseException) -> int | None:
    if type(error) is OSError and str(error).startswith("Forbidden: "):
        return 403  # gcsfs
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
    """Yield an error and its causes."""
    while error is not None:
        yield error
        error = error.__cause__


class Retries:
    """Decides whether a call is retried. A long call reports bytes that arrive by `progress`."""

    def __init__(self, on_bytes: Callable[[], object] = lambda: None) -> None:
        self._on_bytes = on_bytes
        self.progressed = float("-inf")

    def progress(self) -> None:
        """Count progress, and call `on_bytes`."""
        self.progressed = time.monotonic()
        self._on_bytes()

    def allow(self, attempt: int, began: float, error: Exception) -> bool:
        """Whether to try again after `attempt` attempts since `began`; the last raised `error`."""
        waited = time.monotonic() - max(began, self.progressed)
        return is_transient(error) and attempt < MAX_ATTEMPTS and waited <= GIVE_UP_SECONDS


def retrying(call: Callable[[], T], retries: Retries | None = None) -> T:
    """Call `call`, and retry it after transient errors; raises the last error."""
    retries, began = retries or Retries(), time.monotonic()
    for attempt in itertools.count(1):
        try:
            return call()
        except storage_errors() as error:
            if not retries.allow(attempt, began, error):
                raise
            reason = cause_of(error)
        # Jitter, so that workers that failed at the same time do not retry at the same time.
        pause = random.uniform(0.5, 1.0) * FIRST_PAUSE * 2 ** min(attempt - 1, MOST_DOUBLINGS)
        _log.debug("attempt %d failed (%s): retrying in %.1f s", attempt, reason, pause)
        time.sleep(pause)
    raise AssertionError("the loop ends by return or raise")


def cause_of(error: Exception, *, writing: bool = False) -> str:
    """Describe in a few words why reading or writing failed, without secrets."""
    if isinstance(error, FileNotFoundError) and not error.strerror and "/" in str(error):
        if isinstance(error.__cause__, Exception) and not is_missing(error):
            return cause_of(error.__cause__)
        return NO_SUCH_BUCKET if writing else "no such file"  # fsspec's message is only the path
    text = (error.strerror if isinstance(error, OSError) else None) or str(error)
    # Azure appends request numbers and repeats the error as XML: both are cut off.
    text = text.partition("RequestId:")[0] or text
    return redact_text(" ".join(text.split()).rstrip(".")) or type(error).__name__


def advice_on(error: Exception) -> str:
    """What to do about a failed write, as the end of a sentence; empty if unknown."""
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    return "; free some space, then run the same command again" if full else ""


@contextlib.contextmanager
def own_limits() -> Iterator[None]:
    """Raise StorageError if reading fails because this machine has no space or open files left.

    Another attempt may succeed, so this is not a fault of what is read.
    """
    try:
        yield
    except Exception as error:
        for code in (one.errno for one in _chain(error) if isinstance(one, OSError)):
            cause = os.strerror(code or 0)
            if code in (errno.ENOSPC, errno.EDQUOT):
                raise StorageError(
                    f"Cannot write temporary files to {tempfile.gettempdir()}: {cause}; free some "
                    "space there, or set TMPDIR to another folder."
                ) from error
            if code in NO_MORE_FILES:
                raise too_many_files(cause) from error
        raise


def too_many_files(cause: str) -> StorageError:
    """The error for a process or a machine that cannot open more files."""
    return StorageError(f"Cannot open more files: {cause}; raise the limit with `ulimit -n`.")


def why_not_opened(url: str, error: Exception) -> str:
    """Describe why fsspec cannot open a URL, and which package to install if one is missing."""
    extra = EXTRAS.get(protocol_of(url))
    if isinstance(error, ImportError) and extra is not None:
        return f"a package is missing; pip install 'latentmill[{extra}]'"
    if extra == "azure" and "connection_string or account_name" in str(error):
        settings = "AZURE_STORAGE_ACCOUNT_NAME or AZURE_STORAGE_CONNECTION_STRING"
        return f"the storage account is unknown; set {settings}"
    return cause_of(error)


def refuse_secrets(what: str, url: str, error: type[LatentmillError]) -> None:
    """Raise `error` if a URL contains credentials, which the store would record for its readers."""
    shown = redact(url)
    if shown != url:
        raise error(
            f"{what} {shown} carries credentials, or something that looks like them (***): remove "
            "them and put them where the service's own tools look for them (docs/storage.md)."
        )


def _loaded(names: tuple[tuple[str, str], ...]) -> tuple[type[Exception], ...]:
    """The classes whose modules are imported."""
    found = [getattr(sys.modules.get(module), name, None) for module, name in names]
    return tuple(one for one in found if one is not None)
