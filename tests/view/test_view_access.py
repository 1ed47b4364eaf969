"""Who may read the page, and what can be asked of the server."""

from __future__ import annotations

import http.client
import json
import re
import socket
import urllib.parse
from pathlib import Path

import pytest
from view_server import SCRIPT, Site, make_source, make_store, serving

from latentmill.store.store import LatentStore
from latentmill.view.query import MAX_CHANNELS
from support.elsewhere import sources_elsewhere
from support.runs import PATIENCE_SECONDS


def raw(site: Site, request: bytes) -> bytes:
    """The whole answer to bytes that no client library would send."""
    parts = urllib.parse.urlsplit(site.url)
    with socket.create_connection(
        (parts.hostname, parts.port), timeout=PATIENCE_SECONDS
    ) as connection:
        connection.sendall(request)
        answer = b""
        while block := connection.recv(1 << 16):
            answer += block
    return answer


def test_the_page_and_its_files_have_the_headers_of_a_closed_page(site: Site) -> None:
    page = site.get("")
    assert page.status == 200 and b'<script type="module" src=' in page.body
    names = [part.split('"')[0] for part in page.body.decode().split('src="')[1:]]
    names += [part.split('"')[0] for part in page.body.decode().split('href="')[1:]]
    for name in ["", *(name for name in names if not name.startswith("#"))]:
        answer = site.get(name)
        assert answer.status == 200, name
        policy = answer.headers["content-security-policy"]
        assert "default-src 'none'" in policy and "unsafe" not in policy
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["referrer-policy"] == "no-referrer"
        assert "access-control-allow-origin" not in answer.headers
    text = page.body.decode()
    assert "<style" not in text and "style=" not in text and "onclick" not in text


@pytest.mark.parametrize("change", ["", "x", "X" * 43, "é", "%00", "..%2f", "short"])
def test_a_wrong_token(site: Site, change: str) -> None:
    token = site.url.rstrip("/").rpartition("/")[2]
    wrong = token[: -len(change)] + change if change == "x" else change
    for path in (f"/{wrong}/", f"/{wrong}/api/store", f"/{wrong}", f"/?token={token}"):
        answer = site.request(site.root + urllib.parse.quote(path, safe="/?=%"))
        assert answer.status == 403, path
        assert b"token" in answer.body and token.encode() not in answer.body


@pytest.mark.parametrize(
    "host",
    [
        "example.com",
        "127.0.0.1.example.com",
        "localhost.example.com:80",
        "127.0.0.1:80@example.com",
        "127.0.0.1:99:example.com",
        "localhost:",
        "0.0.0.0",
        "",
        "[::1]",
    ],
)
def test_another_host_name(site: Site, host: str) -> None:
    """A web site whose name was made to lead here (DNS rebinding)."""
    assert site.request(site.url, Host=host).status in (400, 421)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.1:9", "localhost:8888", "LocalHost"])
def test_names_of_this_machine(site: Site, host: str) -> None:
    """A forwarded port (ssh -L) has another number."""
    assert site.request(site.url, Host=host).status == 200


def test_two_host_names(site: Site) -> None:
    path = urllib.parse.urlsplit(site.url).path.encode()
    answer = raw(
        site,
        b"GET "
        + path
        + b" HTTP/1.1\r\nHost: 127.0.0.1\r\nHost: x.com\r\nConnection: close\r\n\r\n",
    )
    assert answer.split(b" ")[1] in (b"400", b"421")


@pytest.mark.parametrize(
    "method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS", "HEAD", "TRACE", "X"]
)
def test_other_methods(site: Site, method: str) -> None:
    for path in ("", "api/store", "api/search"):
        answer = site.request(site.url + path, method=method)
        assert answer.status in (405, 501)


@pytest.mark.parametrize(
    "path",
    [
        "static/../app.py",
        "static/%2e%2e/app.py",
        "static/..%2fapp.py",
        "..%2f..%2fetc/passwd",
        "static//etc/passwd",
        "/etc/passwd",
        "dataset.json",
        "shards/000000.parquet",
        "static/main.js%00.css",
        "static/",
        "static",
        "api",
        "static\\main.js",
    ],
)
def test_paths_outside_of_the_list(site: Site, path: str) -> None:
    target = urllib.parse.urlsplit(site.url).path + path
    answer = raw(
        site,
        f"GET {target} HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n".encode(),
    )
    assert answer.split(b" ")[1] in (b"400", b"403", b"404"), answer[:100]


def test_a_request_that_is_no_http(site: Site) -> None:
    assert b"200" not in raw(site, b"\x16\x03\x01 hello\r\n\r\n").split(b"\r\n")[0]
    assert site.get("api/store").status == 200


KEYS = [
    "absent",
    "../north/bass",
    "/etc/passwd",
    "north/bass.wav",
    "\0",
    "a" * 9000,
    "north/%62ass",
]


@pytest.mark.parametrize("key", KEYS)
def test_a_key_that_is_not_in_the_index(site: Site, key: str) -> None:
    mix = {"channels": [{"key": key}]}
    for answer in (
        site.get("api/record", key=key),
        site.get("picture", key=key, of="latent"),
        site.get("audio", mix=mix),
        site.get("api/python", mix=mix),
    ):
        assert answer.status == 404 and "no record with this key" in answer.json["error"]


LONG = {"channels": [{"key": "north/bass", "offset": 2**31 - 1}]}
INVALID = [
    ("audio", {"mix": "{"}),
    ("audio", {"mix": "[" * 3000}),
    ("audio", {"mix": []}),
    ("audio", {"mix": {}}),
    ("audio", {"mix": {"channels": []}}),
    ("audio", {"mix": {"channels": [{"key": "north/bass", "gain_db": 1e9}]}}),
    ("audio", {"mix": '{"channels": [{"key": "north/bass", "gain_db": NaN}]}'}),
    ("audio", {"mix": {"channels": [{"key": "north/bass", "pan": 2}]}}),
    ("audio", {"mix": {"channels": [{"key": "north/bass", "pan": 0.5}]}}),
    ("audio", {"mix": {"channels": [{"key": "north/bass", "offset": 10**30}]}}),
    ("audio", {"mix": {"channels": [{"key": "north/bass", "more": 1}]}}),
    ("audio", {"mix": {"channels": [{"gain_db": 1}]}}),
    ("audio", {"mix": {"channels": [{"key": 1}]}}),
    ("audio", {"mix": {"channels": [{"key": "north/bass", "mute": "perhaps"}]}}),
    ("audio", {"mix": {"channels": ["north/bass"]}}),
    ("audio", {"mix": {"channels": {"key": "north/bass"}}}),
    ("audio", {"mix": {"channels": [{"key": "north/bass"}], "start": -1}}),
    ("audio", {"mix": {"channels": [{"key": "north/bass"}], "start": 0.5}}),
    ("audio", {"mix": {"channels": [{"key": "north/bass"}], "start": 10**6}}),
    ("audio", {"mix": {"channels": [{"key": "north/bass"}], "frames": 0}}),
    ("audio", {"mix": {"channels": [{"key": "north/bass"}], "frames": 1}}),
    ("audio", {"mix": {"channels": [{"key": "north/bass", "offset": -(10**6)}]}}),
    ("audio", {"mix": LONG}),
    ("audio", {"mix": {"channels": [{"key": "north/bass"}] * (MAX_CHANNELS + 1)}}),
    ("audio", {"mix": {"channels": [{"key": "north/bass"}]}, "of": "x"}),
    ("audio", {}),
    ("audio", {"what": "x"}),
    ("picture", {"key": "north/bass", "of": "../x"}),
    ("api/search", {"limit": "10000"}),
    ("api/search", {"limit": "-1"}),
    ("api/search", {"offset": "1e9"}),
    ("api/search", {"offset": "٣"}),
    ("api/search", {"where": "x"}),
    ("api/search", {"where": [{"field": "nothing", "op": "is", "value": 1}]}),
    ("api/search", {"where": [{"field": "duration", "op": "contains", "value": 1}]}),
    ("api/search", {"where": [{"field": "duration", "op": "min", "value": "1"}]}),
    ("api/search", {"where": [{"field": "role", "op": "is", "value": True}]}),
    ("api/search", {"where": [{"field": "metadata_live", "op": "is", "value": 1}]}),
    ("api/search", {"where": [{"field": "duration", "op": "min", "value": 1}] * 99}),
    ("api/search", {"where": [{"field": "duration", "op": "min", "value": 10**400}]}),
    ("api/search", {"where": [{"field": "duration", "op": "min", "value": []}]}),
    ("api/search", {"where": [{"field": "duration", "op": "least", "value": 1}]}),
    ("api/search", {"where": ["duration"]}),
    ("api/search", {"sort": "role"}),
    ("api/search", {"sort": "x" * 500}),
    ("api/search", {"key": "x" * 5000}),
    ("api/values", {"field": "duration"}),
    ("api/values", {}),
]


BOTH = [(path, given) for path, given in INVALID if path == "audio" and "mix" in given]
BOTH = [("api/python", {"mix": given["mix"]}) for _, given in BOTH if "of" not in given]


@pytest.mark.parametrize(("path", "parameters"), [*INVALID, *BOTH])
def test_invalid_parameters_get_one_sentence(site: Site, path: str, parameters: dict) -> None:
    answer = site.get(path, **parameters)
    assert answer.status in (400, 404), answer.body[:200]
    error = answer.json["error"]
    assert error.count("\n") == 0 and error.endswith(".")
    assert not re.search(r"nput|permitted|valid|tuple|union|\.bool", error.removeprefix("invalid "))


def test_a_parameter_twice(site: Site) -> None:
    assert site.request(f"{site.url}api/search?key=a&key=b").status == 400


def test_a_request_that_is_too_long(site: Site) -> None:
    assert site.get("api/search", key="x" * 40_000).status == 414
    with pytest.raises((ConnectionError, http.client.HTTPException, AssertionError)):
        assert site.get("api/search", key="x" * 200_000).status < 400
    assert site.get("api/store").status == 200


def test_names_that_look_like_html_are_data(site: Site) -> None:
    found = site.get("api/search", key="<script>")
    assert found.headers["content-type"] == "application/json"
    assert [one["key"] for one in found.json["records"]] == [SCRIPT]
    own = json.loads(site.get("api/record", key=SCRIPT).json["metadata"])
    assert own["</table>"] == "<b>bold</b>"
    mix = {"channels": [{"key": SCRIPT}]}
    download = site.get("audio", mix=mix, name='x"\r\nevil: 1/../é')
    assert download.headers["content-disposition"] == 'attachment; filename="x---evil--1-----.wav"'


def test_nothing_is_written(site: Site, store: LatentStore, source: Path) -> None:
    def state() -> dict[str, tuple[int, int]]:
        files = [*Path(store.url).rglob("*"), *source.rglob("*")]
        return {str(f): (f.stat().st_size, f.stat().st_mtime_ns) for f in files}

    before = state()
    mix = {"channels": [{"key": "north/bass"}, {"key": "north/drums"}]}
    for side in ("latent", "decoded", "original"):
        assert site.get("audio", mix=mix, of=side).status == 200
    assert site.get("picture", key="north/bass", of="spectrogram").status == 200
    assert state() == before


@pytest.mark.filterwarnings("ignore:.* is not complete")
def test_addresses_that_a_store_names_are_not_requested(tmp_path: Path) -> None:
    pytest.importorskip("aiohttp")
    source = make_source(tmp_path / "source")
    make_store(tmp_path / "store", source)
    mix = {"channels": [{"key": "north/bass"}]}
    with sources_elsewhere(tmp_path / "store", source) as (store, requests):
        with serving(store) as site:
            answer = site.get("audio", mix=mix, of="original")
            assert answer.status == 400
            assert "--remote-sources" in answer.json["error"]
        assert not requests
        with serving(store, remote_sources=True) as site:
            assert site.get("audio", mix=mix, of="original").status == 200
        assert requests
