"""Running the server of `latentmill view` until it is interrupted."""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
import secrets
import socket
import sys
import threading
import webbrowser
from collections.abc import Callable, Iterator

from latentmill.errors import ConfigError
from latentmill.store.store import LatentStore

HOST = "127.0.0.1"
INSTALL = "pip install 'latentmill[view]'"


def check_installed() -> None:
    """Raise ConfigError if a package that the server needs is missing."""
    for name in ("starlette", "uvicorn"):
        if importlib.util.find_spec(name) is None:
            raise ConfigError(f"latentmill view needs the package {name}: run {INSTALL}.")


def listening(port: int) -> socket.socket:
    """A socket on this machine's own address; port 0 is any free one."""
    server = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        server.bind((HOST, port))
    except OSError as error:
        server.close()
        raise ConfigError(
            f"Cannot listen on port {port}: {error.strerror}. Use another --port, or 0 for any."
        ) from error
    return server


def has_display() -> bool:
    """Whether a browser can open a window here."""
    if sys.platform in ("darwin", "win32"):
        return True
    return any(os.environ.get(name) for name in ("DISPLAY", "WAYLAND_DISPLAY"))


def serve(
    store: LatentStore,
    *,
    port: int = 0,
    options: str = "",
    remote_sources: bool = False,
    browser: bool = False,
    ready: Callable[[str], None] = lambda url: None,
) -> None:
    """Serve a page over a store until the process is interrupted.

    Args:
        store: The store; nothing is written to it.
        port: The port on 127.0.0.1; 0 is any free one.
        options: Arguments of `lm.open` after the path, in the Python lines of the page.
        remote_sources: Whether to read source audio from other addresses than this machine and the
            bucket or server of the store.
        browser: Whether to open a browser.
        ready: Called with the address, which contains the token, when the server listens.
    """
    check_installed()
    import uvicorn

    from latentmill.view.app import Viewer

    class Server(uvicorn.Server):
        @contextlib.contextmanager
        def capture_signals(self) -> Iterator[None]:
            """Leave signals to the command line: a graceful end would wait for decoding."""
            yield

    token = secrets.token_urlsafe(32)
    with listening(port) as bound:
        app = Viewer(store, options=options, remote_sources=remote_sources).app(token)
        bound.listen(128)
        url = f"http://{HOST}:{bound.getsockname()[1]}/{token}/"
        logging.getLogger("uvicorn").setLevel(logging.CRITICAL)  # faults of clients
        ready(url)
        if browser:
            threading.Thread(target=webbrowser.open, args=(url,), daemon=True).start()
        config = uvicorn.Config(
            app,
            http="h11",
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            limit_concurrency=256,
            h11_max_incomplete_event_size=1 << 16,
        )
        Server(config).run(sockets=[bound])
