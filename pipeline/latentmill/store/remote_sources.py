"""Which sources of a store may be read: those at other addresses only with the user's consent."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from latentmill.audio.media import is_remote
from latentmill.errors import ItemError
from latentmill.record import Record
from latentmill.sources.address import item_at
from latentmill.store.store import LatentStore
from latentmill.text.log import get_logger
from latentmill.text.printing import counted

_log = get_logger("store")


def source_is_near(store: LatentStore, record: Record) -> bool:
    """Whether a source is on this machine, or in the bucket or on the server of the store.

    Looking at a store must not send requests to addresses that the store names.
    """
    address = item_at(record.source_uri).uri
    if not is_remote(address):
        return True
    try:
        here, there = urlsplit(store.url), urlsplit(address)
    except ValueError:  # the address is not a valid URL
        return False
    return (here.scheme, here.netloc) == (there.scheme, there.netloc)


@dataclass(frozen=True)
class _SourceLimit:
    """Sources that are not near a store are refused; `refused` has the keys of their records."""

    store: LatentStore
    refused: set[str] = field(default_factory=set)


_limit: ContextVar[_SourceLimit | None] = ContextVar("_limit", default=None)


@contextlib.contextmanager
def sources_near(store: LatentStore, *, remote_sources: bool) -> Iterator[None]:
    """Let `check_source` refuse sources that are not near the store, unless `remote_sources`.

    It applies to this thread. Logs a warning with the number of records whose source was refused.
    """
    limit = None if remote_sources else _SourceLimit(store)
    token = _limit.set(limit)
    try:
        yield
    finally:
        _limit.reset(token)
        if limit is not None and limit.refused:
            were = "was" if len(limit.refused) == 1 else "were"
            _log.warning(
                "%s at another address %s not read: if you trust the store, add --remote-sources",
                counted(len(limit.refused), "source"),
                were,
            )


def check_source(record: Record) -> None:
    """Raise ItemError if `sources_near` refuses the source of a record."""
    limit = _limit.get()
    if limit is not None and not source_is_near(limit.store, record):
        limit.refused.add(record.key)
        raise ItemError("it is at another address (add --remote-sources if you trust the store)")
