"""A proxy on 127.0.0.1 in front of an S3 or web server, which answers wrongly now and then.

Seeded: which requests fail depends on the seed and on their number alone. Each request is counted
by what became of it.
"""

from __future__ import annotations

import http.client
import random
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar
from urllib.parse import urlsplit

ERRORS = ((500, "InternalError"), (503, "ServiceUnavailable"), (503, "SlowDown"))
BODY = '<?xml version="1.0"?><Error><Code>{}</Code><Message>{}</Message></Error>'


@dataclass
class Faults:
    """What a proxy does wrong. May be changed while it runs.

    Attributes:
        errors: Share of the requests that are answered by an error of the server.
        cuts: Share of the requests whose connection is cut, before or in the middle of the answer.
        latency: Seconds before an answer.
        deny: Whether a request (method, path with query) is answered by `denial`.
        denial: The status and the code of such an answer.
        seed: Of the draws.
        seen: How many requests there were of each kind: `ok`, `error`, `cut`, `denied`.
        busiest: The most requests that waited at once for their answers to begin.
    """

    errors: float = 0.0
    cuts: float = 0.0
    latency: float = 0.0
    deny: Callable[[str, str], bool] | None = None
    denial: tuple[int, str] = (403, "AccessDenied")
    seed: int = 0
    seen: Counter[str] = field(default_factory=Counter)
    busiest: int = 0
    _busy: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def __post_init__(self) -> None:
        self._random = random.Random(self.seed)

    def draw(self, method: str, path: str) -> str:
        """What becomes of the next request."""
        with self._lock:
            value = self._random.random()
            kind = "error" if value < self.errors else "ok"
            if self.errors <= value < self.errors + self.cuts:
                kind = "cut"
            if self.deny is not None and self.deny(method, path):
                kind = "denied"
            self.seen[kind] += 1
            return kind

    @contextmanager
    def working(self) -> Iterator[None]:
        with self._lock:
            self._busy += 1
            self.busiest = max(self.busiest, self._busy)
        try:
            yield
        finally:
            with self._lock:
                self._busy -= 1


@contextmanager
def faulty_proxy(target: str, faults: Faults) -> Iterator[str]:
    """Serve `target` (http://host:port) with faults; gives the proxy's URL."""
    upstream = urlsplit(target)

    class Handler(_Handler):
        host = upstream.netloc
        behaviour = faults

    server = _Server(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Server(ThreadingHTTPServer):
    request_queue_size = 256  # connections that may wait to be accepted


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = 30
    disable_nagle_algorithm = True
    host: ClassVar[str]
    behaviour: ClassVar[Faults]

    def handle_any(self) -> None:
        with self.behaviour.working():
            body = self._body()
            time.sleep(self.behaviour.latency)
        kind = self.behaviour.draw(self.command, self.path)
        if kind == "error":
            number = self.behaviour.seen["error"] % len(ERRORS)
            self._refuse(*ERRORS[number])
        elif kind == "denied":
            self._refuse(*self.behaviour.denial)
        elif kind == "cut" and self.behaviour.seen["cut"] % 2:
            self._cut()  # before anything was done
        else:
            self._forward(body, cut=kind == "cut")

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = handle_any  # noqa: N815

    def _body(self) -> bytes:
        if self.headers.get("Expect", "").lower() == "100-continue":
            self.send_response_only(100)
            self.end_headers()
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            body = b""
            while size := int(self.rfile.readline().split(b";")[0], 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return body
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _forward(self, body: bytes, *, cut: bool) -> None:
        connection = http.client.HTTPConnection(self.host, timeout=30)
        skipped = ("transfer-encoding", "content-length", "expect", "connection", "host")
        headers = {k: v for k, v in self.headers.items() if k.lower() not in skipped}
        connection.request(self.command, self.path, body, {**headers, "Host": self.headers["Host"]})
        answer = connection.getresponse()
        data = answer.read()
        connection.close()
        self.send_response_only(answer.status, answer.reason)
        for name, value in answer.getheaders():
            if name.lower() not in skipped:
                self.send_header(name, value)
        length = answer.getheader("Content-Length") if self.command == "HEAD" else None
        self.send_header("Content-Length", length or str(len(data)))
        self.end_headers()
        if cut:  # in the middle of the answer, or right behind its head
            self.wfile.write(data[: len(data) // 2])
            self._cut()
        elif self.command != "HEAD":
            self.wfile.write(data)

    def _refuse(self, status: int, code: str) -> None:
        body = BODY.format(code, code).encode()
        self.send_response_only(status)
        self.send_header("Content-Type", "application/xml")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _cut(self) -> None:
        self.wfile.flush()
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        pass
