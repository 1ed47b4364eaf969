"""Retries of reading items, which wait for a server that is busy or unreachable for a while."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from latentmill.storage.remote import MAX_ATTEMPTS, Retries, cause_of, is_transient, status_of
from latentmill.text.log import get_logger
from latentmill.text.redact import redact

_log = get_logger("storage")

OUTAGE_SECONDS = 90.0  # less than `HANG_SECONDS`, after which a trial load is ended
MOST_ATTEMPTS = 24  # as many as the pauses allow in this time


@dataclass
class _Server:
    failing_since: float | None = None  # None while it answers
    reported: bool = False


_servers: dict[str, _Server] = {}  # those that have answered this process


class ItemRetries(Retries):
    """Retries for up to `OUTAGE_SECONDS` if the server has answered before, or reports an error.

    Items that fail later in the same outage are retried as other calls are, and so are those of a
    server that has never answered, because its address may be wrong.
    """

    def __init__(self, url: str, on_bytes: Callable[[], object] = lambda: None) -> None:
        super().__init__(on_bytes)
        self._server = "/".join(url.split("/", 3)[:3])  # or the bucket

    def progress(self) -> None:
        _servers[self._server] = _Server()
        super().progress()

    def allow(self, attempt: int, began: float, error: Exception) -> bool:
        if not is_transient(error):
            return False
        usual = super().allow(attempt, began, error)
        if self._server not in _servers and status_of(error) is None:
            return usual
        server, now = _servers.setdefault(self._server, _Server()), time.monotonic()
        server.failing_since = now if server.failing_since is None else server.failing_since
        if attempt < MAX_ATTEMPTS:
            return usual
        since = min(max(began, self.progressed), server.failing_since)
        if attempt >= MOST_ATTEMPTS or now - since > OUTAGE_SECONDS:
            return False
        if not server.reported:
            server.reported = True
            _log.warning(
                "%s is busy or cannot be reached (%s): retrying for up to %.0f s",
                redact(self._server),
                cause_of(error),
                OUTAGE_SECONDS,
            )
        return True
