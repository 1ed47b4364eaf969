"""Items on trial: what kills, hangs or ends a decoder is named, whatever else fails is not."""

from __future__ import annotations

import functools
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import soundfile

from latentmill.engine import trial_load
from latentmill.engine.trial_load import TrialLoader
from latentmill.sources.base import Item
from latentmill.sources.webdataset import WebDatasetSource
from support import runs
from support.sources import put, tar_of

DEADLY = runs.TESTS / "support" / "deadly"
SEGFAULT, OUT_OF_MEMORY, HANG, EXIT, LONG = 22051, 22052, 22053, 22054, 22055


def item(folder: Path, rate: int, name: str = "", seconds: int = 4) -> Item:
    path = folder / (name or f"{rate}.wav")
    noise = np.random.default_rng(rate).uniform(-0.3, 0.3, seconds * rate)
    soundfile.write(path, noise, rate, format="WAV")
    return Item(path.stem, str(path), path.stat().st_size, "1")


@pytest.fixture(scope="module")
def trials() -> Iterator[TrialLoader]:
    with pytest.MonkeyPatch.context() as patch, TrialLoader(44100, 1, hang_seconds=60) as trials:
        patch.setattr(sys, "path", [str(DEADLY), *sys.path])
        yield trials
        server = trials._server
    assert server is None or server.returncode is not None


def with_limit(trials: TrialLoader, hang_seconds: float) -> TrialLoader:
    """A loader that uses the same server."""
    loader = TrialLoader(44100, 1, hang_seconds=hang_seconds)
    loader._server, loader._socket = trials._server, trials._socket
    return loader


def test_each_way_to_die_is_named_and_the_next_item_is_tried(
    trials: TrialLoader, tmp_path: Path
) -> None:
    reasons = {rate: trials.failure_reason(item(tmp_path, rate)) for rate in (22050, SEGFAULT)}
    server = trials._server
    for rate in (OUT_OF_MEMORY, HANG, EXIT, 44100):
        loader = with_limit(trials, 0.5) if rate == HANG else trials
        reasons[rate] = loader.failure_reason(item(tmp_path, rate))
    assert reasons == {
        22050: None,
        SEGFAULT: "loading it kills the process (SIGSEGV)",
        OUT_OF_MEMORY: "loading it kills the process (SIGKILL, possibly out of memory)",
        HANG: "loading it hangs: no progress for 0.5 s",
        EXIT: "loading it ends the process (exit code 3)",
        44100: None,
    }
    assert trials._server is server  # no new process had to start


def test_an_orderly_failure_is_left_to_the_worker(trials: TrialLoader, tmp_path: Path) -> None:
    broken = tmp_path / "broken.wav"
    broken.write_bytes(b"RIFF, but not much of it")
    assert trials.failure_reason(Item("broken", str(broken), 24, "1")) is None
    assert trials.failure_reason(Item("gone", str(tmp_path / "gone.wav"), 24, "1")) is None


def test_an_item_is_not_blamed_for_another_one_of_its_tar(
    trials: TrialLoader, tmp_path: Path
) -> None:
    """The worker reports that the tar was rewritten."""
    good, deadly = (
        (f"{rate}.wav", Path(item(tmp_path, rate, seconds=1).uri).read_bytes())
        for rate in (22050, SEGFAULT)
    )
    source = WebDatasetSource(put(f"{tmp_path}/x.tar", tar_of([good, deadly])), ("wav",))
    (first, second) = source.items()
    assert "SIGSEGV" in (trials.failure_reason(second) or "")
    put(source.uri, tar_of([deadly, good]))
    assert trials.failure_reason(first) is None


def test_a_server_that_dies_is_replaced(trials: TrialLoader, tmp_path: Path) -> None:
    good = item(tmp_path, 22050)
    assert trials.failure_reason(good) is None
    assert trials._server is not None
    first = trials._server.pid
    os.kill(first, signal.SIGKILL)
    reason = trials.failure_reason(good)
    assert reason == "loading it kills the process (SIGKILL, possibly out of memory)"
    assert trials.failure_reason(good) is None
    assert trials._server is not None
    assert trials._server.pid != first


def test_no_item_fails_if_the_server_does_not_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = item(tmp_path, 22050)
    with TrialLoader(44100, 1) as loader:
        with monkeypatch.context() as patch:
            patch.setattr(sys, "executable", "/bin/false")
            with pytest.raises(RuntimeError, match="loads items on trial does not start"):
                loader.failure_reason(good)
        assert loader.failure_reason(good) is None


def test_the_server_has_the_modules_of_its_worker(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of the current folder may have the names of others; the worker's may be only there."""
    good = item(tmp_path, 22050)
    (tmp_path / "soundfile.py").write_text("raise SystemExit(1)")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PYTHONPATH", raising=False)
    with TrialLoader(44100, 1) as loader:
        assert loader.failure_reason(good) is None


def test_a_long_item_may_take_longer_than_it_may_be_silent(
    trials: TrialLoader, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A machine that is very busy may really make no progress for 2 s: then it is tried again."""
    with TrialLoader(44100, 1, hang_seconds=2.0) as loader:
        for _ in range(3):
            loader.failure_reason(item(tmp_path, 44100))  # starts the server
            server, began = loader._server, time.monotonic()
            with monkeypatch.context() as patch:
                patch.setattr(trial_load, "START_SECONDS", 0.0)  # the socket's limit is 2 s, too
                reason = loader.failure_reason(item(tmp_path, LONG, seconds=24))
            if reason is None:
                break
        assert reason is None
        assert time.monotonic() - began > 3
        assert loader._server is server


def test_a_slow_fetch_is_no_hang(trials: TrialLoader, tmp_path: Path) -> None:
    recording = item(tmp_path, 22050)
    assert trials.failure_reason(recording) is None
    loader = with_limit(trials, 2.0)

    class Slow(SimpleHTTPRequestHandler):
        def do_GET(self) -> None:
            time.sleep(3.0)
            super().do_GET()

    handler = functools.partial(Slow, directory=str(tmp_path))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/{Path(recording.uri).name}"
        began = time.monotonic()
        assert loader.failure_reason(Item("slow", url, recording.size, "")) is None
        server.shutdown()
    assert time.monotonic() - began > 2


def test_nothing_outlives_a_worker_that_is_killed(trials: TrialLoader, tmp_path: Path) -> None:
    trials.failure_reason(item(tmp_path, 22050))
    assert trials._server is not None
    assert trials._socket is not None
    patient = with_limit(trials, 600)
    asking = threading.Thread(target=patient.failure_reason, args=[item(tmp_path, HANG)])
    asking.start()
    server = trials._server.pid
    runs.until(lambda: len(runs.descendants(server)) == 1, "an item hangs")
    (child,) = runs.descendants(server)
    trials._socket.shutdown(2)  # what the death of this process would do
    runs.until(lambda: not runs.alive(child) and not runs.alive(server), "both are gone")
    asking.join()
