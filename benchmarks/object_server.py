"""A server of S3 objects at a latency, for `reader_remote.py`, fast enough to measure clients."""

from __future__ import annotations

import asyncio
import http.client
import threading
from urllib.parse import urlsplit

_OF_OBJECTS = ("x-id=GetObject", "Signature=")  # in queries of requests for objects


class ObjectServer:
    """Answers GET of objects from memory, and asks another S3 server for everything else.

    Attributes:
        url: Its address.
        latency: Seconds before each answer.
        requests: Number of requests so far.
        working: Number of requests that wait for their answers.
        most: The most of them so far.
    """

    def __init__(self, target: str) -> None:
        self._host = urlsplit(target).netloc
        self._objects: dict[str, bytes] = {}
        self.url, self.latency = "", 0.0
        self.requests = self.working = self.most = 0
        ready = threading.Event()
        threading.Thread(target=lambda: asyncio.run(self._serve(ready)), daemon=True).start()
        ready.wait()

    async def _serve(self, ready: threading.Event) -> None:
        server = await asyncio.start_server(self._connected, "127.0.0.1", 0, backlog=512)
        self.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        ready.set()
        await server.serve_forever()

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
                self.requests += 1
                self.working += 1
                self.most = max(self.most, self.working)
                await asyncio.sleep(self.latency)
                self.working -= 1
                writer.writelines(await self._answer(head))
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()

    async def _answer(self, head: list[str]) -> tuple[bytes, bytes]:
        method, target, _ = head[0].split()
        fields = (line.partition(":") for line in head[1:] if line)
        headers = {name.lower(): value.strip() for name, _, value in fields}
        path, _, query = target.partition("?")
        if method != "GET" or (query and not any(name in query for name in _OF_OBJECTS)):
            status, kind, body, size = await asyncio.to_thread(self._ask, method, target, headers)
            return _head(status, size, f"Content-Type: {kind}"), body
        if path not in self._objects:
            whole = {name: value for name, value in headers.items() if name != "range"}
            status, kind, body, size = await asyncio.to_thread(self._ask, "GET", target, whole)
            if status != 200:
                return _head(status, size, f"Content-Type: {kind}"), body
            self._objects[path] = body
        data = self._objects[path]
        if "range" not in headers:
            return _head(200, len(data)), data
        first, _, last = headers["range"].removeprefix("bytes=").partition("-")
        part = data[int(first) : int(last or len(data)) + 1]
        place = f"Content-Range: bytes {first}-{int(first) + len(part) - 1}/{len(data)}"
        return _head(206, len(part), place), part

    def _ask(
        self, method: str, target: str, headers: dict[str, str]
    ) -> tuple[int, str, bytes, int]:
        """Status, type, body and size of the other server's answer."""
        connection = http.client.HTTPConnection(self._host, timeout=60)
        connection.request(method, target, headers=headers)
        answer = connection.getresponse()
        body, kind = answer.read(), answer.headers.get("Content-Type", "binary/octet-stream")
        connection.close()
        return answer.status, kind, body, int(answer.headers.get("Content-Length") or len(body))


def _head(status: int, size: int, *more: str) -> bytes:
    lines = [
        f"HTTP/1.1 {status} {http.client.responses[status]}",
        f"Content-Length: {size}",
        'ETag: "0"',
        "Last-Modified: Mon, 01 Jun 2026 00:00:00 GMT",
        *more,
    ]
    return "\r\n".join([*lines, "", ""]).encode()
