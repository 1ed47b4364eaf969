"""A web server that sends a file in parts, each of them when the test allows it."""

from __future__ import annotations

import http.server
import threading
from collections.abc import Iterator
from contextlib import contextmanager

PARTS = 3


class Gate:
    """Lets the parts of all downloads pass, one at a time."""

    def __init__(self) -> None:
        self._allowed = threading.Semaphore(0)

    def pass_part(self) -> None:
        self._allowed.release()

    def open(self) -> None:
        """Let everything pass."""
        self._allowed.release(1000)

    def wait(self) -> None:
        self._allowed.acquire()


@contextmanager
def gated(data: bytes) -> Iterator[tuple[str, Gate]]:
    """The URL of a file that is sent in `PARTS` parts, and the gate that lets them pass."""
    gate, length = Gate(), -(-len(data) // PARTS)

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()

        def do_GET(self) -> None:
            self.do_HEAD()
            for start in range(0, len(data), length):
                gate.wait()
                self.wfile.write(data[start : start + length])

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/a.wav", gate
        finally:
            gate.open()
            server.shutdown()
            thread.join()
