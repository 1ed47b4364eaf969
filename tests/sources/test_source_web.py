"""Sources on web servers, which list no folders, and of which some know no ranges."""

from __future__ import annotations

import http.server
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http import HTTPStatus
from pathlib import Path
from typing import Any

import pytest

from latentmill.errors import ItemError, SourceError
from latentmill.sources.base import ByteRange, Item
from latentmill.sources.files import version_of
from latentmill.sources.open import is_there
from latentmill.sources.reading import UnitReader
from latentmill.storage import remote
from support.hub import serving
from support.sources import KINDS, Recording, Written, put, sorted_items, tar_of

DATA = bytes(range(256)) * 2000  # more than is read ahead of a tar
RECORDINGS = [Recording(name, ".wav", DATA, {"title": name}) for name in ("a", "b c")]


@contextmanager
def web(folder: Path, *, ranges: bool, denies: bool = False) -> Iterator[str]:
    """Serve a folder; gives its URL. `denies`: as buckets do, what is not there and folders."""

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args: object) -> None:
            super().__init__(*args, directory=str(folder))  # type: ignore[arg-type]

        def do_GET(self) -> None:
            path = Path(self.translate_path(self.path))
            asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
            if not (ranges and asked and path.is_file()):
                super().do_GET()
                return
            data = path.read_bytes()
            start, end = int(asked[1]), min(int(asked[2]) + 1, len(data))
            self.send_response(HTTPStatus.PARTIAL_CONTENT)
            self.send_header("Content-Range", f"bytes {start}-{end - 1}/{len(data)}")
            self.send_header("Content-Length", str(end - start))
            self.end_headers()
            self.wfile.write(data[start:end])

        def send_head(self) -> Any:
            if denies and not Path(self.translate_path(self.path)).is_file():
                self.send_error(HTTPStatus.FORBIDDEN)
                return None
            return super().send_head()

        def copyfile(self, *args: object) -> None:
            try:
                super().copyfile(*args)  # type: ignore[arg-type]
            except ConnectionError:
                self.close_connection = True  # whoever asked has seen enough

        def log_message(self, *args: object) -> None:
            pass

    with serving(Handler) as url:
        yield url


@pytest.fixture(params=["webdataset", "parquet", "csv", "table"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def read(items: list[Item]) -> list[bytes]:
    with UnitReader(items) as reader:
        found = []
        for item in items:
            with reader.open(item) as media:
                found.append(media.read_at(0, media.size))
        return found


def served(written: Written, folder: Path, url: str) -> list[Item]:
    """The items by one file's URL each, or by a manifest's."""
    uris = [written.uri.replace(str(folder), url)]
    if written.uri.endswith("/data"):
        uris = [f"{uris[0]}/train-{{0..1}}.parquet"]
    return sorted_items(Written(uris[0], {}, {}, {}).open())


def test_keys_on_the_web_are_those_of_a_disk(kind: str, tmp_path: Path) -> None:
    written = KINDS[kind](str(tmp_path), RECORDINGS)
    with web(tmp_path, ranges=True) as url:
        items = served(written, tmp_path, url)
        assert [item.key for item in items] == sorted(written.keys.values())
        assert read(items) == [DATA, DATA]
        if kind in ("webdataset", "parquet"):
            assert all(item.version for item in items)


def test_a_page_that_names_tars_is_read_like_a_folder(tmp_path: Path) -> None:
    members = [("a.wav", DATA), ("b.wav", DATA)]
    put(f"{tmp_path}/tars/x.tar", tar_of(members))
    with web(tmp_path, ranges=True) as url:
        source = Written(f"{url}/tars/*.tar", {}, {}, {}).open()
        items = sorted_items(source)  # the page does not say how long a tar is
        assert [item.key for item in items] == ["x/a", "x/b"]
        assert source.ignored == {}
        assert read(items) == [DATA, DATA]


def test_patterns_where_the_server_denies_what_is_not_there(tmp_path: Path) -> None:
    for number in range(2):
        put(f"{tmp_path}/x-{number}.tar", tar_of([("a.wav", DATA)]))
    with web(tmp_path, ranges=True, denies=True) as url:
        uri = f"{url}/x-{{0..1}}.tar"
        assert [i.key for i in sorted_items(Written(uri, {}, {}, {}).open())] == ["x-0/a", "x-1/a"]
        assert is_there(uri)
        assert not is_there(f"{url}/y-{{0..1}}.tar")
        with pytest.raises(SourceError, match="cannot be listed: 403"):
            is_there(f"{url}/list.csv")


def test_a_server_without_ranges_is_enough_for_whole_files(
    kind: str, tmp_path: Path, one_sentence: Callable[[BaseException], str]
) -> None:
    many = [Recording(f"r{n}", ".wav", bytes([n]) * (4 << 20), {}) for n in range(4)]
    written = KINDS[kind](str(tmp_path), many)
    with web(tmp_path, ranges=False) as url:
        if kind in ("csv", "table"):
            assert read(served(written, tmp_path, url)) == [one.data for one in many]
            return
        if kind == "parquet":  # so repetitive that it is short: written anew as it is
            _uncompressed(tmp_path / "data")
        with pytest.raises(SourceError) as caught:
            served(written, tmp_path, url)
    assert "doesn't appear to support range requests" in one_sentence(caught.value)


def _uncompressed(folder: Path) -> None:
    import pyarrow.parquet as pq

    for path in folder.iterdir():
        pq.write_table(pq.read_table(path), path, compression="none", use_dictionary=False)


def test_a_part_of_a_file_is_never_all_of_it(tmp_path: Path) -> None:
    put(f"{tmp_path}/x.tar", DATA)
    with web(tmp_path, ranges=False) as url:
        item = Item("a", f"{url}/x.tar", 512, "", place=ByteRange(512, 512))
        with pytest.raises(ItemError, match="its server does not support ranges"):
            read([item])


def test_folders_and_what_is_not_there(
    tmp_path: Path,
    one_sentence: Callable[[BaseException], str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(remote, "FIRST_PAUSE", 0.001)
    put(f"{tmp_path}/music/a.wav", DATA)
    with web(tmp_path, ranges=True) as url:
        wrong = {
            f"{url}/music": "web servers do not list folders: list its files in a manifest",
            f"{url}/gone": "does not exist: check the path",
            f"{url}/gone.csv": "does not exist",
            f"{url}/gone-{{0..1}}.tar": "gone-0.tar does not exist",
        }
        for uri, says in wrong.items():
            with pytest.raises(SourceError) as caught:
                sorted_items(Written(uri, {}, {}, {}).open())
            assert says in one_sentence(caught.value)
    for uri in (f"{url}/music", f"{url}/list.csv", f"{url}/x-{{0..1}}.tar"):  # it is gone now
        with pytest.raises(SourceError, match="Connect call failed"):
            sorted_items(Written(uri, {}, {}, {}).open())


@pytest.mark.parametrize(
    ("modify", "version"),
    [("20261130101344", "20261130101344"), ("Nov 30 10:13", ""), ("Nov 30 2025", "")],
)
def test_the_version_of_a_file_on_an_ftp_server(modify: str, version: str) -> None:
    """Listings for people, which servers without MLSD give, change with the age of the file."""
    assert version_of({"name": "/a.tar", "size": 1, "modify": modify}) == version
