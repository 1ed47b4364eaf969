"""Servers that are busy or away for a while: their items are waited for, but not too long."""

from __future__ import annotations

import logging
import uuid
from collections.abc import Callable
from types import SimpleNamespace

import pytest

from latentmill.sources.base import ByteRange, Item
from latentmill.sources.reading import UnitReader
from latentmill.storage import outages, remote
from latentmill.storage.outages import OUTAGE_SECONDS, ItemRetries
from latentmill.storage.remote import MAX_ATTEMPTS, retrying
from support.faulty_s3 import Faults
from support.storage_faults import faulty_s3


class BusyError(OSError):
    """As of a server that answers 503."""

    status = 503


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[], float]:
    """Time passes only in pauses."""
    now = [0.0]

    def sleep(seconds: float) -> None:
        now[0] += seconds

    time = SimpleNamespace(monotonic=lambda: now[0], sleep=sleep)
    monkeypatch.setattr(remote, "time", time)
    monkeypatch.setattr(outages, "time", time)
    return time.monotonic


@pytest.fixture
def url() -> str:
    return f"s3://{uuid.uuid4().hex}/a.wav"


def attempts(url: str, error: Exception, until: Callable[[], bool] = lambda: False) -> int:
    """Number of attempts to read an item; the last one raised `error` if it is negative."""
    calls: list[int] = []

    def read() -> None:
        calls.append(1)
        if not until():
            raise error

    try:
        retrying(read, ItemRetries(url))
    except type(error):
        return -len(calls)
    return len(calls)


def test_a_busy_server_is_waited_for(
    clock: Callable[[], float], url: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "latentmill"):
        assert attempts(url, BusyError("slow down"), lambda: clock() > 60) > MAX_ATTEMPTS
    assert clock() < OUTAGE_SECONDS
    assert len(caplog.records) == 1
    assert "slow down" in caplog.text


def test_an_outage_is_waited_for_once(clock: Callable[[], float], url: str) -> None:
    ItemRetries(url).progress()  # it has answered
    assert attempts(url, ConnectionResetError()) < -MAX_ATTEMPTS
    assert OUTAGE_SECONDS < clock() < OUTAGE_SECONDS + 10
    before = clock()
    assert attempts(url, ConnectionResetError()) == -MAX_ATTEMPTS
    assert clock() - before < 20
    ItemRetries(url).progress()
    assert attempts(url, ConnectionResetError()) < -MAX_ATTEMPTS


def test_a_wrong_address_is_not_waited_for(clock: Callable[[], float], url: str) -> None:
    assert attempts(url, ConnectionRefusedError()) == -MAX_ATTEMPTS
    assert clock() < 20


def test_an_error_that_stays_is_not_waited_for(clock: Callable[[], float], url: str) -> None:
    ItemRetries(url).progress()
    assert attempts(url, FileNotFoundError()) == -1
    assert clock() == 0


@pytest.mark.parametrize("place", [None, ByteRange(3, 4)])
def test_items_of_a_bucket_that_throttles(s3_bucket: str, place: ByteRange | None) -> None:
    import fsspec

    uri = f"{s3_bucket}/a.tar"
    fs, path = fsspec.core.url_to_fs(uri)
    fs.pipe_file(path, b"0123456789")
    item = Item("a", uri, 4 if place else 10, "", place=place)
    faults = Faults(denial=(503, "SlowDown"))
    faults.deny = lambda method, path: faults.seen["denied"] <= MAX_ATTEMPTS
    with faulty_s3(faults), UnitReader([item]) as reader, reader.open(item) as media:
        assert media.read_at(0, 20) == (b"3456" if place else b"0123456789")
    assert faults.seen["denied"] > MAX_ATTEMPTS
