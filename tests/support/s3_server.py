"""An S3 on 127.0.0.1. It is moto's, with conditional writes that are atomic, as those of S3 are.

moto looks whether the object exists and stores the new one in two steps: of several writers with
`If-None-Match: *`, more than one can succeed.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

CONDITIONS = ("HTTP_IF_MATCH", "HTTP_IF_NONE_MATCH")


@contextmanager
def s3_server() -> Iterator[str]:
    """Answer requests in threads of this process; gives the URL."""
    from moto.moto_server.werkzeug_app import MotoRequestHandler, create_backend_app
    from werkzeug.serving import make_server

    class Handler(MotoRequestHandler):
        def log_request(self, *args: object) -> None:
            """Log nothing: nobody reads it, and each line takes time."""

    app = create_backend_app("s3")  # moto's own way to it looks at all services for each request
    one_writer = threading.Lock()

    def atomic(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        writes = environ["REQUEST_METHOD"] in {"PUT", "POST"}
        conditional = writes and any(name in environ for name in CONDITIONS)
        with one_writer if conditional else nullcontext():
            answer: Iterable[bytes] = app(environ, start_response)
            return answer

    server = make_server("127.0.0.1", 0, atomic, threaded=True, request_handler=Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
