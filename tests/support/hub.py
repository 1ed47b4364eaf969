"""A hub on 127.0.0.1 that serves one repository's folder, as HF_ENDPOINT."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit


@dataclass(frozen=True)
class Hub:
    """A running hub: its address, and the requests so far as `METHOD path`."""

    endpoint: str
    requests: list[str] = field(default_factory=list)


@contextmanager
def serve(root: Path, repo: str, revision: str) -> Iterator[Hub]:
    """Serve `root` as the repository `repo` at `revision` (and as `main`) until the block ends."""
    requests: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self._answer(body=False)

        def do_GET(self) -> None:
            self._answer(body=True)

        def _answer(self, body: bool) -> None:
            requests.append(f"{self.command} {self.path}")
            path = self._file()
            content = path.read_bytes() if path else b"no such file"
            self.send_response(HTTPStatus.OK if path else HTTPStatus.NOT_FOUND)
            self.send_header("Content-Length", str(len(content)))
            self.send_header("X-Repo-Commit", revision)
            if path:
                self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
            else:
                self.send_header("X-Error-Code", "EntryNotFound")
            self.end_headers()
            if body:
                self.wfile.write(content)

        def _file(self) -> Path | None:
            parts = unquote(urlsplit(self.path).path)
            for name in ("main", revision):
                prefix = f"/{repo}/resolve/{name}/"
                path = (root / parts.removeprefix(prefix)).resolve()
                if parts.startswith(prefix) and path.is_relative_to(root.resolve()):
                    return path if path.is_file() else None
            return None

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002
            """Say nothing: `Hub.requests` holds what was asked for."""

    with serving(Handler) as endpoint:
        yield Hub(endpoint, requests)


@contextmanager
def serving(handler: type[BaseHTTPRequestHandler]) -> Iterator[str]:
    """Answer requests on 127.0.0.1 until the block ends; gives the address."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
