"""Who may read the page: only requests to this machine that have the token in their path.

A web site in the same browser can send requests to 127.0.0.1, also under a host name of its own
(DNS rebinding), but it does not know the token, and it cannot read the answers.
"""

from __future__ import annotations

import hmac
import re
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

_HOST = re.compile(rb"(127\.0\.0\.1|localhost)(:[0-9]{1,5})?", re.I)
LONGEST_QUERY = 1 << 15
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "x-frame-options": "DENY",
    "cache-control": "no-store",
}


class Access:
    """Refuses requests that may not be answered, and adds the headers of every answer."""

    def __init__(self, app: App, token: str) -> None:
        self._app, self._token = app, token.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return

        async def send_with_headers(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                own = [(name.encode(), value.encode()) for name, value in HEADERS.items()]
                message["headers"] = [*message.get("headers", []), *own]
            await send(message)

        status, reason = self._refusal(scope)
        if status:
            await _refuse(send_with_headers, status, reason)
            return
        rest = scope["path"][len(self._token) + 1 :]
        inner = {**scope, "path": rest, "raw_path": rest.encode(), "root_path": ""}
        await self._app(inner, receive, send_with_headers)

    def _refusal(self, scope: Scope) -> tuple[int, str]:
        """Status and reason; 0 if the request may be answered."""
        hosts = [value for name, value in scope["headers"] if name == b"host"]
        if len(hosts) != 1 or not _HOST.fullmatch(hosts[0]):
            return 421, "This server answers only under 127.0.0.1 and localhost."
        token, slash, _ = scope["path"][1:].partition("/")
        if not hmac.compare_digest(token.encode(errors="replace"), self._token) or not slash:
            return 403, "The address has no valid token: use the one that latentmill view printed."
        if scope["method"] != "GET":
            return 405, "Only GET is answered: this server does not write."
        if len(scope["query_string"]) > LONGEST_QUERY:
            return 414, "The request is too long: use fewer channels or conditions."
        return 0, ""


async def _refuse(send: Send, status: int, reason: str) -> None:
    headers = [(b"content-type", b"text/plain; charset=utf-8")]
    if status == 405:
        headers.append((b"allow", b"GET"))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": f"{reason}\n".encode()})
