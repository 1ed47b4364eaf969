"""Shared by the openers of buckets: common options, and errors for settings obstore lacks."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeAlias
from urllib.request import getproxies

from latentmill.storage.remote import CONNECT_SECONDS, READ_SECONDS

OpenStore: TypeAlias = Callable[[float], Any]
"""Opens a bucket for requests of at most a number of seconds each."""


class UnsupportedError(Exception):
    """The configuration of a client cannot be carried over; the message names the option."""


def refuse(unsupported: dict[str, Any]) -> None:
    """Raise UnsupportedError for the first option whose value is true."""
    for name, found in unsupported.items():
        if found:
            raise UnsupportedError(name)


def has_proxy(scheme: str) -> bool:
    """Whether the environment has a proxy for `http` or `https`."""
    return bool(getproxies().keys() & {scheme, "all"})


def options(
    endpoint: str,
    seconds: float,
    *,
    connect: float = CONNECT_SECONDS,
    read: float = READ_SECONDS,
    headers: dict[str, str] | None = None,
) -> dict[str, Any]:
    """How obstore opens a bucket of any kind, without retries of its own."""
    client: dict[str, Any] = {
        "allow_http": endpoint.startswith("http://"),
        "connect_timeout": timedelta(seconds=connect),
        "read_timeout": timedelta(seconds=read),
        "timeout": timedelta(seconds=seconds),
    }
    if headers:
        client["default_headers"] = headers
    # `remote.retrying` retries.
    return {"client_options": client, "retry_config": {"max_retries": 0}}
