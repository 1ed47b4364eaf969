"""The command `latentmill view` as a process of its own."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from latentmill.errors import ConfigError
from latentmill.store.schema import DATASET_PATH
from latentmill.store.store import LatentStore
from latentmill.view import serve
from support import runs
from support.latent_store import write_latents

pytest.importorskip("uvicorn", reason="needs uvicorn: pip install 'latentmill[view]'")


@contextmanager
def started(store: LatentStore, *options: str) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", "latentmill", "view", store.url, "--no-browser", *options]
    pipe = subprocess.PIPE
    process = subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def read(url: str) -> Any:
    with urllib.request.urlopen(url, timeout=runs.PATIENCE_SECONDS) as answer:
        return json.loads(answer.read())


@pytest.mark.parametrize(
    "number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)]
)
def test_ctrl_c_ends_it_at_once(store: LatentStore, number: signal.Signals) -> None:
    """Also with a connection whose request is not complete."""
    with started(store, "--json") as process:
        assert process.stdout is not None
        printed = json.loads(process.stdout.readline())
        assert printed["records"] == 7 and printed["url"].startswith("http://127.0.0.1:")
        host, _, port = printed["url"].split("/")[2].partition(":")
        assert read(f"{printed['url']}api/store")["records"] == 7
        with socket.create_connection((host, int(port))) as kept:
            kept.sendall(b"GET / HTTP/1.1\r\n")
            process.send_signal(number)
            out, err = process.communicate(timeout=runs.PATIENCE_SECONDS)
        assert (process.returncode, out, err) == (130, "", "latentmill: stopped\n")


def test_the_address_is_printed(store: LatentStore) -> None:
    with started(store) as process:
        assert process.stdout is not None
        lines = [process.stdout.readline() for _ in range(3)]
    assert store.url in lines[0]
    assert lines[1].strip().startswith("http://127.0.0.1:") and "Ctrl-C" in lines[2]


def test_a_port_that_is_in_use(store: LatentStore, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = runs.call(capsys, "view", store.url, "--no-browser", "--port", port)
    assert done.code == 2
    assert f"Cannot listen on port {port}" in done.err and "--port" in done.err


def test_only_this_machine_is_listened_to() -> None:
    with serve.listening(0) as bound:
        assert bound.getsockname()[0] == "127.0.0.1"


def test_a_missing_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    monkeypatch.setattr(serve.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'latentmill\[view\]'"):
        serve.check_installed()


@pytest.mark.skipif(sys.platform != "linux", reason="the display of Linux")
def test_no_browser_without_a_display(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(name, raising=False)
    assert not serve.has_display()
    monkeypatch.setenv("DISPLAY", ":0")
    assert serve.has_display()


INTERRUPTED = """
import contextlib, os, signal
from latentmill.store import metadata_file

write = metadata_file.write_metadata

def interrupted(*args):
    write(*args)
    with contextlib.suppress(SUPPRESSED):
        os.kill(os.getpid(), signal.SIGINT)

metadata_file.write_metadata = interrupted
from latentmill.cli.entry import main
main()
"""


@pytest.mark.parametrize(
    "suppressed", [pytest.param("", marks=pytest.mark.slow), "KeyboardInterrupt"]
)
def test_ctrl_c_while_it_starts_leaves_no_temporary_files(suppressed: str, tmp_path: Path) -> None:
    """A store of an earlier version is searched in a temporary file.

    An import or a C extension may suppress the exception.
    """
    store = write_latents(str(tmp_path / "s"), [3] * 4)
    path = tmp_path / "s" / DATASET_PATH
    document = json.loads(path.read_text())
    del document["metadata"], document["metadata_hash"]
    path.write_text(json.dumps(document))
    (tmp_path / "scratch").mkdir()
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            INTERRUPTED.replace("SUPPRESSED", suppressed),
            "view",
            store.url,
            "--no-browser",
        ],
        env={**os.environ, "TMPDIR": str(tmp_path / "scratch")},
        capture_output=True,
        text=True,
        check=False,
        timeout=runs.PATIENCE_SECONDS,
    )
    assert (done.returncode, done.stdout) == (130, ""), done.stderr
    assert "Traceback" not in done.stderr
    assert not list((tmp_path / "scratch").iterdir())


@pytest.mark.slow
@pytest.mark.timeout(600)  # ten starts of Python on a busy machine
def test_ctrl_c_ten_times(store: LatentStore) -> None:
    """While answers are computed and connections are open."""
    mix = urllib.parse.quote(json.dumps({"channels": [{"key": "north/bass"}]}))
    for number in range(10):
        with started(store, "--json") as process:
            assert process.stdout is not None
            url = json.loads(process.stdout.readline())["url"]
            asking = [
                threading.Thread(target=ask, args=(f"{url}audio?mix={mix}",)) for _ in range(4)
            ]
            for thread in asking:
                thread.start()
            threading.Event().wait(0.02 * number)
            process.send_signal(signal.SIGINT)
            _, err = process.communicate(timeout=runs.PATIENCE_SECONDS)
            for thread in asking:
                thread.join(60)
        assert (process.returncode, err) == (130, "latentmill: stopped\n")


def ask(url: str) -> None:
    """Request what may not be answered any more."""
    with contextlib.suppress(OSError, http.client.HTTPException):
        urllib.request.urlopen(url, timeout=runs.PATIENCE_SECONDS).close()
