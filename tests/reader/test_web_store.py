"""A store on a web server, with and without pages that list its folders."""

from __future__ import annotations

import functools
import http.server
import logging
import re
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import latentmill as lm
from latentmill.errors import StorageError
from latentmill.storage.storage import Storage
from latentmill.store.store import LatentStore
from support.latent_store import write_latents


class Server(http.server.SimpleHTTPRequestHandler):
    """Files of a folder, whole or in ranges, and no pages."""

    pages = False

    def do_GET(self) -> None:
        wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        path = Path(self.translate_path(self.path))
        if wanted is None or not path.is_file():
            super().do_GET()
            return
        first, last = map(int, wanted.groups())
        data = path.read_bytes()[first : last + 1]
        self.send_response(206)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("Content-Range", f"bytes {first}-{last}/{path.stat().st_size}")
        self.end_headers()
        self.wfile.write(data)

    def list_directory(self, path: str) -> object:
        if self.pages:
            return super().list_directory(path)
        return self.send_error(404)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        pass


@pytest.fixture(params=[True, False], ids=["pages", "no pages"])
def web(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    kind = type("Kind", (Server,), {"pages": request.param})
    handler = functools.partial(kind, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.parametrize("cached", [False, True])
def test_crops_are_those_of_the_local_store(web: str, cached: bool, tmp_path: Path) -> None:
    lengths = [5, 30, 12, 9]
    local = write_latents(str(tmp_path / "store"), lengths, per_unit=2)
    cache = {"cache": tmp_path / "cache"} if cached else {}
    remote = lm.LatentDataset(f"{web}/store", crop=8, **cache)  # type: ignore[arg-type]
    for ours, theirs in zip(remote, lm.LatentDataset(local, crop=8), strict=True):
        assert np.array_equal(ours.latents, theirs.latents)
        assert ours.metadata == theirs.metadata


@pytest.mark.parametrize("web", [True], indirect=True, ids=["pages"])
def test_a_page_that_lists_a_folder_is_asked_for_its_files_sizes(web: str, tmp_path: Path) -> None:
    local = write_latents(str(tmp_path / "store"), [5, 30], per_unit=1)
    listed = Storage(f"{web}/store").list("shards")
    assert listed == local.storage.list("shards")
    assert len(listed) == 2


def test_a_shard_that_is_cut_is_noticed(web: str, tmp_path: Path) -> None:
    write_latents(str(tmp_path / "store"), [30])
    shard = next((tmp_path / "store" / "shards").iterdir())
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(StorageError, match="does not have the size"):
        lm.LatentDataset(LatentStore(f"{web}/store"), crop=8, metadata=False)[0]


@pytest.mark.parametrize("web", [False], indirect=True, ids=["no pages"])
def test_it_is_evaluated_and_nothing_is_recorded(
    web: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    local = write_latents(str(tmp_path / "store"), [5, 30, 12, 9], per_unit=2)
    with caplog.at_level(logging.WARNING, "latentmill.evaluation"):
        found = lm.evaluate(f"{web}/store", only=["statistics"]).statistics
    (message,) = caplog.messages
    assert message.startswith(f"not recorded: The output {web}/store cannot be written because ")
    expected = lm.evaluate(local, only=["statistics"], record=False).statistics
    assert found == expected
    assert not (tmp_path / "store" / "evaluation").exists()


def test_a_local_view_of_a_store_on_a_web_server(web: str, tmp_path: Path) -> None:
    local = write_latents(str(tmp_path / "store"), [5, 30, 12, 9], per_unit=2)
    view = Path(lm.select(local, tmp_path / "view").dest)
    seal = view / "dataset.json"
    seal.write_text(seal.read_text().replace(local.url, f"{web}/store"))
    for ours, theirs in zip(
        lm.LatentDataset(view, crop=8), lm.LatentDataset(local, crop=8), strict=True
    ):
        assert np.array_equal(ours.latents, theirs.latents)
