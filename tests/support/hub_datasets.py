"""A hub on 127.0.0.1 with one dataset repository: what `hf://datasets/...` asks for."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

from support.hub import serving

SHA = "0" * 39 + "1"


def _entry(root: Path, path: Path) -> dict[str, object]:
    name = path.relative_to(root).as_posix()
    if path.is_dir():
        return {"type": "directory", "path": name, "oid": hashlib.sha1(name.encode()).hexdigest()}
    data = path.read_bytes()
    oid = hashlib.sha1(data).hexdigest()
    return {"type": "file", "path": name, "size": len(data), "oid": oid}


@contextmanager
def serve(root: Path, repo: str) -> Iterator[str]:
    """Serve `root` as the dataset `repo` until the block ends; gives the endpoint."""
    root = root.resolve()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            url = urlsplit(self.path)
            path = unquote(url.path)
            if path in (f"/api/datasets/{repo}", f"/api/datasets/{repo}/revision/main"):
                self._json({"id": repo, "sha": SHA, "private": False, "tags": []})
            elif match := re.fullmatch(rf"/api/datasets/{repo}/tree/main/?(.*)", path):
                recursive = parse_qs(url.query).get("recursive") == ["true"]
                self._tree(self._inside(match[1]), recursive)
            elif match := re.fullmatch(rf"/datasets/{repo}/resolve/main/(.*)", path):
                self._file(self._inside(match[1]))
            else:
                self._nothing()

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_POST(self) -> None:
            body = parse_qs(self.rfile.read(int(self.headers["Content-Length"])).decode())
            paths = [self._inside(name) for name in body.get("paths", [])]
            self._json([_entry(root, path) for path in paths if path and path.exists()])

        def _inside(self, name: str) -> Path | None:
            path = (root / name).resolve()
            return path if path.is_relative_to(root) else None

        def _tree(self, folder: Path | None, recursive: bool) -> None:
            if folder is None or not folder.is_dir():
                self._nothing()
                return
            found = sorted(folder.rglob("*") if recursive else folder.iterdir())
            self._json([_entry(root, path) for path in found])

        def _file(self, path: Path | None) -> None:
            if path is None or not path.is_file():
                self._nothing()
                return
            data, status, headers = path.read_bytes(), HTTPStatus.OK, {}
            if match := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
                first, last = int(match[1]), min(int(match[2] or len(data)), len(data) - 1)
                headers = {"Content-Range": f"bytes {first}-{last}/{len(data)}"}
                data, status = data[first : last + 1], HTTPStatus.PARTIAL_CONTENT
            self._send(data, status, {"ETag": '"x"', "Accept-Ranges": "bytes", **headers})

        def _json(self, value: object) -> None:
            self._send(json.dumps(value).encode(), HTTPStatus.OK, {})

        def _nothing(self) -> None:
            self._send(b"{}", HTTPStatus.NOT_FOUND, {"X-Error-Code": "EntryNotFound"})

        def _send(self, body: bytes, status: HTTPStatus, headers: dict[str, str]) -> None:
            self.send_response(status)
            for name, value in {"X-Repo-Commit": SHA, **headers}.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002
            """Say nothing."""

    with serving(Handler) as endpoint:
        yield endpoint
