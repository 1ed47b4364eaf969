"""A server of `latentmill view` over a real socket, in a thread, and the stores that it shows."""

from __future__ import annotations

import contextlib
import io
import json
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from latentmill.run.run import encode
from latentmill.store.store import LatentStore, open_store
from support.in_process import in_process
from support.runs import PATIENCE_SECONDS

RATE, HOP = 3200, 32
STEMS = ("bass", "drums", "vocals")
SCRIPT = "<script>alert('key')"


def make_source(folder: Path, *, channels: int = 1) -> Path:
    """Two songs of three stems, and a file whose name and metadata look like HTML."""
    rng = np.random.default_rng(5)
    for song, seconds in {"north": 2.0, "south": 1.5}.items():
        for number, stem in enumerate(STEMS):
            count = round((seconds - 0.2 * number) * RATE)
            wave = np.sin(np.arange(count) * 2 * np.pi * 110 * (number + 1) / RATE)[:, None]
            sound = 0.2 * wave + 0.05 * rng.standard_normal((count, channels))
            path = folder / song / f"{stem}.wav"
            path.parent.mkdir(parents=True, exist_ok=True)
            soundfile.write(path, sound, RATE, subtype="FLOAT")
            own = {"bpm": 90 + 10 * number, "title": f"{song} {stem} été", "live": number == 0}
            path.with_suffix(".json").write_text(json.dumps(own))
    silence = 0.01 * rng.standard_normal((RATE // 2, channels))
    soundfile.write(folder / f"{SCRIPT}.wav", silence, RATE, subtype="FLOAT")
    own = {"title": "<img src=x onerror=alert(1)>", "</table>": "<b>bold</b>", "bpm": -5.5}
    (folder / f"{SCRIPT}.json").write_text(json.dumps(own))
    return folder


def make_store(folder: Path, source: Path, **options: Any) -> LatentStore:
    options = {
        "model": "mdct",
        "model_options": {"hop": HOP, "sample_rate": RATE},
        "chunk_seconds": 0.5,
        "group_by": r"(?P<group>[^/]+)/(?P<role>.*)",
        "device": "cpu",
        **options,
    }
    with in_process():
        encode(source, folder, **options)
    return open_store(folder, device="cpu")


@dataclass
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def audio(self) -> np.ndarray:
        """The samples of a WAV file, `[channels, samples]`."""
        samples, rate = soundfile.read(io.BytesIO(self.body), dtype="float32", always_2d=True)
        assert rate == RATE
        return samples.T


@dataclass
class Site:
    """A running server.

    Attributes:
        url: Its address, with the token.
    """

    url: str

    @property
    def root(self) -> str:
        parts = urllib.parse.urlsplit(self.url)
        return f"{parts.scheme}://{parts.netloc}"

    def get(self, path: str, **parameters: Any) -> Answer:
        """Request a path below the token."""
        texts = {
            name: value if isinstance(value, str) else json.dumps(value)
            for name, value in parameters.items()
        }
        query = urllib.parse.urlencode(texts)
        return self.request(f"{self.url}{path}{'?' if query else ''}{query}")

    def request(self, url: str, *, method: str = "GET", **headers: str) -> Answer:
        asked = urllib.request.Request(url, method=method, headers=headers)
        try:
            with urllib.request.urlopen(asked, timeout=PATIENCE_SECONDS) as found:
                return Answer(found.status, dict(found.headers.items()), found.read())
        except urllib.error.HTTPError as error:
            with error:
                return Answer(error.code, dict(error.headers.items()), error.read())


@contextlib.contextmanager
def serving(store: LatentStore, **settings: Any) -> Iterator[Site]:
    """Serve a store until the end of the block."""
    pytest.importorskip("starlette", reason="needs Starlette: pip install 'latentmill[view]'")
    uvicorn = pytest.importorskip("uvicorn", reason="needs uvicorn: pip install 'latentmill[view]'")
    from latentmill.view import serve as serve_module

    servers: list[Any] = []

    class Watched(uvicorn.Server):  # to stop it, as no signal reaches a thread
        def __init__(self, config: Any) -> None:
            super().__init__(config)
            servers.append(self)

    addresses: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(uvicorn, "Server", Watched)
        thread = threading.Thread(
            target=serve_module.serve,
            args=(store,),
            kwargs={"options": ", device='cpu'", "ready": addresses.append, **settings},
        )
        thread.start()
        try:
            until = time.monotonic() + 60
            while not (servers and servers[0].started) and thread.is_alive():
                assert time.monotonic() < until
                time.sleep(0.01)
            yield Site(addresses[0])
        finally:
            for server in servers:
                server.should_exit = server.force_exit = True
            thread.join(60)
            assert not thread.is_alive()
