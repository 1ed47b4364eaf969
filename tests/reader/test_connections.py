"""The ranged requests of a batch are in flight at the same time."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from latentmill.storage.storage import Storage

CROPS = 64
BYTES = bytes(range(256)) * 16


class _Server(ThreadingHTTPServer):
    request_queue_size = 256  # connections that may wait to be accepted


@pytest.fixture
def endpoint() -> Iterator[str]:
    """An object store that answers ranged requests only when `CROPS` of them are in flight."""
    together = threading.Barrier(CROPS, timeout=240)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            first, last = self.headers["Range"].removeprefix("bytes=").split("-")
            try:
                together.wait()
            except threading.BrokenBarrierError:
                self.send_response(404)
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            data = BYTES[int(first) : int(last) + 1]
            self.send_response(206)
            self.send_header("Content-Length", str(len(data)))
            self.send_header("Content-Range", f"bytes {first}-{last}/{len(BYTES)}")
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *args: object) -> None:
            pass

    server = _Server(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.parametrize("protocol", ["s3", "http"])
def test_a_batch_is_one_round_of_requests(
    protocol: str, endpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    s3fs = pytest.importorskip("s3fs")
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    s3fs.S3FileSystem.clear_instance_cache()
    storage = Storage("s3://bucket/store" if protocol == "s3" else f"{endpoint}/store")
    ranges = [("shards/000000.parquet", 7 * number, 5) for number in range(CROPS)]
    try:
        found = storage.read_ranges(ranges)
    finally:
        s3fs.S3FileSystem.clear_instance_cache()
    assert found == [BYTES[start : start + length] for _, start, length in ranges]
