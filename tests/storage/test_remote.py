"""What storage has in common: URLs with credentials are refused, and which errors pass."""

from __future__ import annotations

import errno
from collections.abc import Callable
from types import SimpleNamespace

import aiohttp
import pytest
from botocore.exceptions import ClientError, EndpointConnectionError
from s3fs.errors import translate_boto_error

from latentmill.audio import open_media
from latentmill.errors import ItemError, SourceError, StoreError
from latentmill.sources.base import Item
from latentmill.sources.folder import FolderSource
from latentmill.sources.reading import UnitReader
from latentmill.storage import remote
from latentmill.storage.remote import is_transient, retrying, status_of
from latentmill.storage.storage import Storage


def test_a_store_or_a_source_whose_url_has_credentials_is_refused() -> None:
    for url in ("https://me:secret@host/music", "https://host/music?token=secret"):
        with pytest.raises(StoreError, match="carries credentials") as store:
            Storage(url)
        with pytest.raises(SourceError, match="carries credentials") as source:
            FolderSource(url, ["wav"])
        assert "secret" not in f"{store.value} {source.value}"


def client_error(status: int, code: str) -> OSError:
    response = {
        "Error": {"Code": code, "Message": "m"},
        "ResponseMetadata": {"HTTPStatusCode": status},
    }
    error = translate_boto_error(ClientError(response, "GetObject"))
    assert isinstance(error, OSError)
    return error


def web_error(status: int) -> Exception:
    return aiohttp.ClientResponseError(None, (), status=status)  # type: ignore[arg-type]


def caused(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "passes"),
    [
        (client_error(503, "SlowDown"), True),
        (client_error(500, "InternalError"), True),
        (client_error(502, "BadGateway"), True),
        (client_error(429, "TooManyRequests"), True),
        (client_error(404, "NoSuchKey"), False),
        (client_error(404, "NoSuchBucket"), False),
        (client_error(403, "AccessDenied"), False),
        (client_error(412, "PreconditionFailed"), False),
        (EndpointConnectionError(endpoint_url="x"), True),
        (TimeoutError(), True),
        (ConnectionResetError(), True),
        (BrokenPipeError(), True),
        (OSError(errno.ETIMEDOUT, "t"), True),
        (web_error(503), True),
        (web_error(404), False),
        (aiohttp.ServerDisconnectedError(), True),
        (aiohttp.ClientPayloadError("cut"), True),
        (caused(aiohttp.ClientPayloadError("cut"), web_error(400)), True),
        (caused(FileNotFoundError("u"), web_error(503)), True),
        (caused(FileNotFoundError("u"), web_error(404)), False),
        (FileNotFoundError(2, "No such file"), False),
        (PermissionError(13, "Permission denied"), False),
        (OSError(errno.ENOSPC, "No space left on device"), False),
        (ValueError("x"), False),
    ],
)
def test_which_errors_pass(error: Exception, passes: bool) -> None:
    assert is_transient(error) == passes


def test_trying_again(monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(remote.time, "sleep", pauses.append)
    calls: list[Exception] = []

    def failing(error: Exception, times: int) -> str:
        def call() -> str:
            if len(calls) < times:
                calls.append(error)
                raise error
            return "done"

        calls.clear()
        pauses.clear()
        return retrying(call)

    assert failing(ConnectionResetError(), remote.MAX_ATTEMPTS - 1) == "done"
    for number, pause in enumerate(pauses):
        full = remote.FIRST_PAUSE * 2**number
        assert full / 2 <= pause <= full
    with pytest.raises(ConnectionResetError):
        failing(ConnectionResetError(), remote.MAX_ATTEMPTS)
    assert len(calls) == remote.MAX_ATTEMPTS
    with pytest.raises(FileNotFoundError):
        failing(FileNotFoundError(), 1)
    assert pauses == []
    with pytest.raises(ZeroDivisionError):
        failing(ZeroDivisionError(), 1)
    monkeypatch.setattr(remote, "GIVE_UP_SECONDS", -1.0)
    with pytest.raises(ConnectionResetError):
        failing(ConnectionResetError(), 1)


@pytest.mark.parametrize("reported", [True, False])
def test_a_long_transfer_is_tried_again_if_it_has_progressed(
    monkeypatch: pytest.MonkeyPatch, reported: bool
) -> None:
    now, calls, arrived = [0.0], [], []
    clock = SimpleNamespace(monotonic=lambda: now[0], sleep=lambda seconds: None)
    monkeypatch.setattr(remote, "time", clock)
    retries = remote.Retries(lambda: arrived.append(1))

    def transfer() -> str:
        calls.append(1)
        for _ in range(10):
            now[0] += remote.GIVE_UP_SECONDS
            if reported:
                retries.progress()
        if len(calls) < 3:
            raise ConnectionResetError
        return "done"

    if reported:
        assert retrying(transfer, retries) == "done"
        assert len(arrived) == 30
    else:  # the clients' own retries have taken this time
        with pytest.raises(ConnectionResetError):
            retrying(transfer, retries)


def test_statuses() -> None:
    assert status_of(client_error(416, "InvalidRange")) == 416
    assert status_of(web_error(418)) == 418
    assert status_of(OSError(5, "io")) is None


@pytest.mark.parametrize("url", ["github://a/b", "dbfs:///a/b", "reference://a", "dir://a"])
def test_a_protocol_that_needs_options_is_refused_in_one_sentence(
    url: str, one_sentence: Callable[[BaseException], str]
) -> None:
    wanted = f"options of the protocol {url.partition(':')[0]} are missing or invalid"
    with pytest.raises(StoreError) as store:
        Storage(url)
    with pytest.raises(SourceError) as source:
        FolderSource(url, ["wav"])
    for caught in (store, source):
        assert wanted in one_sentence(caught.value)
    with pytest.raises(ItemError, match=wanted):
        open_media(f"{url}/c.wav")
    item = Item("c", f"{url}/c.wav", 0, "")  # as in a manifest
    with UnitReader([item]) as reader, pytest.raises(ItemError, match=wanted):
        reader.open(item)
