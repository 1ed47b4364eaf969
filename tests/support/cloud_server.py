"""Reading and listing of Google Cloud Storage and Azure Blob Storage, on 127.0.0.1.

`tests/storage/test_cloud_objects.py` can run the same tests on real emulators.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

ACCOUNT = "devstoreaccount1"
BUCKET = "bucket"
MODIFIED = "Wed, 01 Jan 2020 00:00:00 GMT"
PAGE = 4  # objects in a response


@dataclass
class Cloud:
    """The objects of a bucket, and what was asked for."""

    data: dict[str, bytes] = field(default_factory=dict)
    folders: set[str] = field(default_factory=set)  # keys of Azure's markers of folders
    seen: list[tuple[str, dict[str, str]]] = field(default_factory=list)  # path, headers
    # May answer a request itself.
    answer: Callable[[BaseHTTPRequestHandler, int], bool] = lambda handler, number: False

    def clients(self) -> set[str]:
        """The packages that sent requests for the content of objects, or listed them."""
        agents = [headers.get("user-agent", "") for _, headers in self.seen]
        known = {"adlfs": "adlfs", "gcsfs": "gcsfs", "object_store": "obstore"}
        return {name for agent in agents for mark, name in known.items() if mark in agent}


def reply(handler: BaseHTTPRequestHandler, status: int, data: bytes = b"", **headers: str) -> None:
    handler.send_response(status)
    sent = {"Content-Length": str(len(data)), "Last-Modified": MODIFIED}
    for name, value in (sent | {k.replace("_", "-"): v for k, v in headers.items()}).items():
        handler.send_header(name, value)
    handler.end_headers()
    if handler.command != "HEAD":
        handler.wfile.write(data)


@contextmanager
def serving(handler: type[BaseHTTPRequestHandler]) -> Iterator[str]:
    """Answer requests in threads of this process; gives the URL."""
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        running.daemon_threads = True
        thread = threading.Thread(target=running.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{running.server_port}"
        finally:
            running.shutdown()
            thread.join()


@contextmanager
def cloud_server() -> Iterator[tuple[str, Cloud]]:
    """Serve both kinds from one set of objects; gives the URL."""
    cloud = Cloud()

    class Handler(_Handler):
        pass

    Handler.cloud = cloud
    with serving(Handler) as url:
        yield url, cloud


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    cloud: Cloud

    def do_GET(self) -> None:
        self.cloud.seen.append((self.path, {k.lower(): v for k, v in self.headers.items()}))
        if self.cloud.answer(self, len(self.cloud.seen)):
            return
        url = urlsplit(self.path)
        query = {name: values[0] for name, values in parse_qs(url.query).items()}
        for pattern, answer in (
            (r"/storage/v1/b/([^/]+)/o", self._google_list),
            (r"(?:/download)?/storage/v1/b/([^/]+)/o/(.+)", self._google_object),
            (r"/storage/v1/b/([^/]+)", self._google_bucket),
            (rf"/{ACCOUNT}/([^/]+)", self._azure_container),
            (rf"/{ACCOUNT}/([^/]+)/(.+)", self._azure_blob),
            (r"/([^/]+)/(.+)", self._content),
        ):
            if match := re.fullmatch(pattern, url.path):
                bucket, *key = map(unquote, match.groups())
                if bucket != BUCKET:
                    code = "ContainerNotFound" if ACCOUNT in url.path else "NoSuchBucket"
                    reply(self, 404, error(code), x_ms_error_code=code)
                else:
                    answer(query, *key)
                return
        reply(self, 400, b"unknown request")

    do_HEAD = do_GET  # noqa: N815

    def do_POST(self) -> None:
        """Exchange the key of a service account for a token."""
        self.rfile.read(int(self.headers["Content-Length"]))
        if self.path != "/token":
            reply(self, 404)
            return
        found = {"access_token": "FROMACCOUNT", "expires_in": 3600, "token_type": "Bearer"}
        reply(self, 200, json.dumps(found).encode(), Content_Type="application/json")

    def _google_bucket(self, query: dict[str, str]) -> None:
        reply(self, 200, json.dumps({"kind": "storage#bucket", "name": BUCKET}).encode())

    def _google_list(self, query: dict[str, str]) -> None:
        keys, token = self._page(query.get("prefix", ""), query.get("pageToken", ""))
        found: dict[str, Any] = {"kind": "storage#objects"}
        found["items"] = [self._resource(key) for key in keys]
        if token:
            found["nextPageToken"] = token
        reply(self, 200, json.dumps(found).encode())

    def _google_object(self, query: dict[str, str], key: str) -> None:
        if query.get("alt") == "media":
            self._content(query, key)
        elif key in self.cloud.data:
            reply(self, 200, json.dumps(self._resource(key)).encode())
        else:
            reply(self, 404, json.dumps({"error": {"code": 404, "message": "none"}}).encode())

    def _resource(self, key: str) -> dict[str, Any]:
        times = {"updated": "2020-01-01T00:00:00.000Z", "timeCreated": "2020-01-01T00:00:00.000Z"}
        size = len(self.cloud.data[key])
        # Another value than the ETag of the XML API, as Google has it.
        etag = base64.b64encode(f"generation {size}".encode()).decode()
        return {"name": key, "bucket": BUCKET, "size": str(size), "etag": etag, **times}

    def _azure_container(self, query: dict[str, str]) -> None:
        if query.get("comp") != "list":
            reply(self, 200, ETag='"1"')
            return
        keys, token = self._page(query.get("prefix", ""), query.get("marker", ""))
        blobs = "".join(map(self._blob, keys))
        text = f"<Blobs>{blobs}</Blobs><NextMarker>{escape(token)}</NextMarker>"
        place = f'ServiceEndpoint="http://{self.headers["Host"]}/" ContainerName="{BUCKET}"'
        text = f'<?xml version="1.0"?><EnumerationResults {place}>{text}</EnumerationResults>'
        reply(self, 200, text.encode(), Content_Type="application/xml")

    def _blob(self, key: str) -> str:
        size, etag = len(self.cloud.data[key]), self._etag(key)
        facts = f"<Last-Modified>{MODIFIED}</Last-Modified><Etag>{etag}</Etag>"
        facts += f"<Content-Length>{size}</Content-Length><Content-Type>a/b</Content-Type>"
        facts += "<BlobType>BlockBlob</BlobType>"
        marker = "<hdi_isfolder>true</hdi_isfolder>" if key in self.cloud.folders else ""
        name = f"<Name>{escape(key)}</Name><Properties>{facts}</Properties>"
        return f"<Blob>{name}<Metadata>{marker}</Metadata></Blob>"

    def _azure_blob(self, query: dict[str, str], key: str) -> None:
        self._content(query, key)

    def _etag(self, key: str) -> str:
        return "0x" + hashlib.md5(self.cloud.data[key]).hexdigest()[:15].upper()

    def _page(self, prefix: str, after: str) -> tuple[list[str], str]:
        keys = sorted(key for key in self.cloud.data if key.startswith(prefix) and key > after)
        page = keys[:PAGE]
        return page, page[-1] if len(keys) > PAGE else ""

    def _content(self, query: dict[str, str], key: str) -> None:
        """The bytes of an object in a range, for all APIs."""
        if key not in self.cloud.data:
            reply(self, 404, error("BlobNotFound"), x_ms_error_code="BlobNotFound")
            return
        data = self.cloud.data[key]
        more = {"ETag": f'"{self._etag(key)}"', "x_ms_blob_type": "BlockBlob"}
        asked = self.headers.get("x-ms-range") or self.headers.get("Range")
        if self.command == "HEAD" or asked is None:
            more["Content_Length"] = str(len(data))
            reply(self, 200, data, **more)
            return
        first, last = (int(n) if n else len(data) for n in asked.removeprefix("bytes=").split("-"))
        if first >= len(data):
            reply(self, 416, error("InvalidRange"), x_ms_error_code="InvalidRange")
            return
        part = data[first : last + 1]
        more["Content_Range"] = f"bytes {first}-{first + len(part) - 1}/{len(data)}"
        reply(self, 206, part, **more)


def error(code: str) -> bytes:
    text = f"<Error><Code>{code}</Code><Message>{code} it is.\nRequestId:1</Message></Error>"
    return f'<?xml version="1.0" encoding="UTF-8"?>{text}'.encode()
