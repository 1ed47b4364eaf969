"""Reading S3 with obstore: the bytes, errors and configuration of s3fs, and s3fs where in doubt."""

from __future__ import annotations

import json
import os
import re
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import fsspec
import pytest

from latentmill.storage import object_s3, objects, remote
from latentmill.storage.object_client import UnsupportedError
from support.cloud_server import serving
from support.faulty_s3 import Faults
from support.storage_faults import faulty_s3

pytest.importorskip("obstore")
s3fs = pytest.importorskip("s3fs")

DATA = bytes(range(256)) * 8
NAMES = [
    "plain.wav",
    "a ü ☃ %20 + & # ? = ~ ' (1) [x] {y} *",
    "a/b/c/.hidden",
    "x//y",
    "x/../y",
    "é\u0301",
]
Request = tuple[str, dict[str, str]]  # path and headers in lower case


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "FIRST_PAUSE", 0.01)


def client_of(headers: dict[str, str]) -> str:
    return "s3fs" if "otocore" in headers["user-agent"] else "obstore"


@contextmanager
def server(
    answer: Callable[[BaseHTTPRequestHandler, int], bool] = lambda handler, number: False,
) -> Iterator[tuple[str, list[Request]]]:
    """An object store of one object with any name; `answer` may answer a request itself."""
    seen: list[Request] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            seen.append((self.path, {k.lower(): v for k, v in self.headers.items()}))
            if answer(self, len(seen)):
                return
            first, last = self.headers["Range"].removeprefix("bytes=").split("-")
            reply(self, 206, DATA[int(first) : int(last) + 1], first=int(first))

        def log_message(self, *args: object) -> None:
            pass

    with serving(Handler) as url:
        yield url, seen


def reply(handler: BaseHTTPRequestHandler, status: int, data: bytes, first: int = 0) -> None:
    handler.send_response(status)
    if status == 206:
        bounds = f"bytes {first}-{first + len(data) - 1}/{len(DATA)}"
        handler.send_header("Content-Range", bounds)
    handler.send_header("Content-Length", str(len(data)))
    handler.send_header("Last-Modified", "Wed, 01 Jan 2020 00:00:00 GMT")
    handler.send_header("ETag", '"1"')
    handler.end_headers()
    handler.wfile.write(data)


@pytest.fixture
def aws(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Callable[..., None]]:
    """Sets environment variables; file systems that were opened before are forgotten."""
    for name in [name for name in os.environ if name.startswith(("AWS_", "REQUESTS_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    s3fs.S3FileSystem.clear_instance_cache()

    def set_all(**values: str) -> None:
        for name, value in values.items():
            monkeypatch.setenv(name, value)

    yield set_all
    s3fs.S3FileSystem.clear_instance_cache()


KEYS = {"AWS_ACCESS_KEY_ID": "K" * 16, "AWS_SECRET_ACCESS_KEY": "secret"}


def read(url: str, start: int = 3, end: int = 9) -> bytes:
    return objects.cat_file(*remote.open_filesystem(url), start, end)


@pytest.mark.parametrize("name", NAMES)
def test_both_clients_read_the_same_bytes(
    s3_bucket: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fs, path = remote.open_filesystem(f"{s3_bucket}/{name}")
    fs.pipe_file(path, DATA)
    ranges = [(0, 1), (5, 700), (0, len(DATA)), (len(DATA) - 1, len(DATA) + 50)]
    starts, ends = zip(*ranges, strict=True)
    wanted = [DATA[start:end] for start, end in ranges]
    for switch in ("1", "0"):
        monkeypatch.setenv(objects.SWITCH, switch)
        assert [objects.cat_file(fs, path, *one) for one in ranges] == wanted
        assert objects.cat_ranges(fs, [path] * len(ranges), starts, ends) == wanted
        assert all(type(one) is bytes for one in objects.cat_ranges(fs, [path], [1], [2]))


def test_errors_are_those_of_s3fs(s3_bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fsspec.filesystem("s3").pipe_file(f"{s3_bucket}/a", DATA)

    def errors() -> list[tuple[type, str, int | None, bool]]:
        found = []
        for name in ("none", "a"):
            fs, path = remote.open_filesystem(f"{s3_bucket}/{name}")
            (one,) = objects.cat_ranges(fs, [path], [len(DATA)], [len(DATA) + 1])
            with pytest.raises(OSError) as caught:
                objects.cat_file(fs, path, len(DATA), len(DATA) + 1)
            found += [
                (type(e), remote.cause_of(e), remote.status_of(e), remote.is_transient(e))
                for e in (one, caught.value)
            ]
        return found

    with faulty_s3(Faults()) as faults:
        with_obstore = errors()
        monkeypatch.setenv(objects.SWITCH, "0")
        without = errors()
        # The text and cause of a missing object differ between the versions of s3fs.
        assert [one[0] for one in with_obstore] == [one[0] for one in without]
        assert {one[1] for one in with_obstore[:2]} == {"no such file"}
        assert with_obstore[2:] == without[2:]
        assert with_obstore[2][2] == 416
        faults.deny = lambda method, path: True
        denied = errors()
        monkeypatch.setenv(objects.SWITCH, "1")
        assert errors() == denied
        assert denied[0][0] is PermissionError


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (503, r"ObjectError: SlowDown \(HTTP status 503\)"),
        (429, r"ObjectError: SlowDown \(HTTP status 429\)"),
        ("cut", "ConnectionError: the connection failed"),
        ("half", "ConnectionError: the connection failed"),
        ("hang", "FSTimeoutError: "),
    ],
)
def test_transient_errors_are_retried_and_name_no_url(
    aws: Callable[..., None], error: int | str, text: str
) -> None:
    hanging = threading.Event()

    def fail(handler: BaseHTTPRequestHandler, number: int) -> bool:
        if number not in (2, 3, 4):
            return False
        if isinstance(error, int):
            reply(handler, error, b"<Error><Code>SlowDown</Code><Key>secret</Key></Error>")
            return True
        if error == "hang":
            hanging.wait(30)
        elif error == "half":
            handler.wfile.write(b"HTTP/1.1 206 Partial Content\r\nContent-Length: 6\r\n")
            handler.wfile.write(b"Content-Range: bytes 3-8/2048\r\n")
            handler.wfile.write(b"Last-Modified: Wed, 01 Jan 2020 00:00:00 GMT\r\n\r\nabc")
        handler.close_connection = True
        return True

    options = {"config_kwargs": {"read_timeout": 0.5}}
    with server(fail) as (url, seen), pytest.MonkeyPatch.context() as patch:
        aws(AWS_ENDPOINT_URL=url, **KEYS)
        patch.setitem(fsspec.config.conf, "s3", options)
        assert read("s3://bucket/a") == DATA[3:9]
        with pytest.raises(OSError) as caught:
            read("s3://bucket/a")
        assert remote.is_transient(caught.value)
        assert re.fullmatch(text, f"{type(caught.value).__name__}: {caught.value}")
        assert remote.retrying(lambda: read("s3://bucket/a")) == DATA[3:9]
        assert {client_of(headers) for _, headers in seen} == {"obstore"}
        hanging.set()


def test_a_time_limit_is_that_of_fsspec(aws: Callable[..., None]) -> None:
    stop = threading.Event()
    with server(lambda handler, number: stop.wait(30)) as (url, _):
        aws(AWS_ENDPOINT_URL=url, **KEYS)
        fs, path = remote.open_filesystem("s3://bucket/a")
        with pytest.raises(fsspec.exceptions.FSTimeoutError):
            objects.cat_file(fs, path, 0, 5, seconds=0.3)
        stop.set()


def credential_process(tmp_path: Path, key: str) -> str:
    """A program for `credential_process` whose keys soon expire; it counts its calls."""
    found = {"Version": 1, "AccessKeyId": key, "SecretAccessKey": "s", "SessionToken": "token"}
    found["Expiration"] = "2100-01-01T00:00:00Z"
    program = tmp_path / "process"
    program.write_text(f"#!/bin/sh\necho x >> {tmp_path}/calls\ncat <<E\n{json.dumps(found)}\nE\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    return str(program)


@pytest.mark.parametrize(
    ("case", "key", "region", "path"),
    [
        ("environment", "KKKK", "us-east-1", "/bucket/a"),
        ("profile", "FROMPROCESS", "eu-west-3", "/bucket/a"),
        ("fsspec", "INFSSPEC", "ap-south-1", "/bucket/a"),
        ("anonymous", "", "", "/bucket/a"),
        ("requester", "KKKK", "us-east-1", "/bucket/a"),
    ],
)
def test_the_configuration_of_s3fs_is_carried_over(
    case: str,
    key: str,
    region: str,
    path: str,
    aws: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    options: dict[str, Any] = {}
    with server() as (url, seen):
        # Variables that only obstore knows.
        aws(AWS_VIRTUAL_HOSTED_STYLE_REQUEST="true", AWS_SKIP_SIGNATURE="true", AWS_S3_EXPRESS="1")
        aws(AWS_ENDPOINT="http://127.0.0.1:9", AWS_REQUEST_PAYER="true", AWS_SESSION_TOKEN="")
        if case == "profile":
            process = credential_process(tmp_path, key)
            (tmp_path / "config").write_text(
                f"[profile mine]\ncredential_process = {process}\nregion = {region}\n"
                f"endpoint_url = {url}\n"
            )
            aws(AWS_PROFILE="mine")
        elif case == "fsspec":
            aws(AWS_ENDPOINT_URL_S3="http://127.0.0.1:9", **KEYS)
            client = {"region_name": region, "aws_access_key_id": key}
            client["aws_secret_access_key"] = "s"
            options = {"endpoint_url": url, "client_kwargs": client}
        else:
            aws(AWS_ENDPOINT_URL=url, **KEYS)
            options = {"anon": case == "anonymous", "requester_pays": case == "requester"}
        monkeypatch.setitem(fsspec.config.conf, "s3", options)
        for _ in range(3):
            assert read("s3://bucket/a") == DATA[3:9]
    for asked, headers in seen:
        assert client_of(headers) == "obstore"
        assert asked == path
        assert headers.get("x-amz-request-payer", "") == ("requester" * (case == "requester"))
        assert headers.get("x-amz-security-token", "") == ("token" * (case == "profile"))
        if key:
            assert re.search(rf"Credential={key}\w*/\d+/{region}/s3/", headers["authorization"])
        else:
            assert "authorization" not in headers
    if case == "profile":
        assert (tmp_path / "calls").read_text().count("x") == 1


UNSUPPORTED: dict[str, dict[str, Any]] = {
    "switched off": {},
    "a proxy": {},
    "version_aware": {"version_aware": True},
    "additional arguments": {"s3_additional_kwargs": {"ExpectedBucketOwner": "1"}},
    "signature": {"config_kwargs": {"signature_version": "s3"}},
    "an option for S3": {"config_kwargs": {"s3": {"payload_signing_enabled": True}}},
}


@pytest.mark.parametrize("case", UNSUPPORTED)
def test_s3fs_reads_where_an_option_is_not_supported(
    case: str, aws: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    with server() as (url, seen):
        aws(AWS_ENDPOINT_URL=url, **KEYS)
        if case == "switched off":
            aws(**{objects.SWITCH: "0"})
        elif case == "a proxy":
            aws(HTTP_PROXY="http://127.0.0.1:9", NO_PROXY="127.0.0.1")
        monkeypatch.setitem(fsspec.config.conf, "s3", UNSUPPORTED[case])
        assert read("s3://bucket/a") == DATA[3:9]
        assert [client_of(headers) for _, headers in seen] == ["s3fs"]


@pytest.mark.parametrize("status", [301, 200])
def test_what_only_s3fs_can_read_is_left_to_it(status: int, aws: Callable[..., None]) -> None:
    """Such as a bucket in another region: s3fs follows to it."""

    def refuse(handler: BaseHTTPRequestHandler, number: int) -> bool:
        refused = "otocore" not in handler.headers["User-Agent"]
        if refused:
            reply(handler, status, b"<Error><Code>Other</Code></Error>")
        return refused

    for many in (False, True):
        with server(refuse) as (url, seen):
            aws(AWS_ENDPOINT_URL=url, **KEYS)
            s3fs.S3FileSystem.clear_instance_cache()
            fs, path = remote.open_filesystem("s3://bucket/a")
            for _ in range(3):
                if many:
                    assert objects.cat_ranges(fs, [path], [3], [9]) == [DATA[3:9]]
                else:
                    assert objects.cat_file(fs, path, 3, 9) == DATA[3:9]
            clients = [client_of(headers) for _, headers in seen]
            assert clients == ["obstore", "s3fs", "s3fs", "s3fs"]


FORKED = """
import os, sys
from latentmill.storage import objects, remote
def read():
    return objects.cat_file(*remote.open_filesystem("s3://bucket/a"), 3, 9)
def child():
    if (pid := os.fork()) == 0:
        print(len(read()), flush=True)
        os._exit(0)
    os.waitpid(pid, 0)
assert "obstore" not in sys.modules
child()
read()
child()
read()
"""


def test_a_fork_of_a_process_that_uses_obstore_reads_with_s3fs(aws: Callable[..., None]) -> None:
    with server() as (url, seen):
        aws(AWS_ENDPOINT_URL=url, **KEYS)
        command = [sys.executable, "-c", FORKED]
        ended = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
        assert (ended.returncode, ended.stdout) == (0, "6\n6\n"), ended.stderr
        clients = [client_of(headers) for _, headers in seen]
    assert clients == ["obstore", "obstore", "s3fs", "obstore"]


def test_the_addresses_of_aws(aws: Callable[..., None]) -> None:
    """Those of its own documentation; without a request."""

    def address(bucket: str, **options: Any) -> tuple[str, bool]:
        fs = s3fs.S3FileSystem(skip_instance_cache=True, **options)
        return object_s3._endpoint(fs.s3, bucket)

    aws(AWS_DEFAULT_REGION="eu-west-1", **KEYS)
    assert address("songs") == ("https://songs.s3.eu-west-1.amazonaws.com", True)
    assert address("my.songs") == ("https://s3.eu-west-1.amazonaws.com", False)
    path = {"config_kwargs": {"s3": {"addressing_style": "path"}}}
    assert address("songs", **path) == ("https://s3.eu-west-1.amazonaws.com", False)
    other = {"endpoint_url": "https://objects.example.com:9000/"}
    assert address("songs", **other) == ("https://objects.example.com:9000", False)
    for refused in (
        {"client_kwargs": {"verify": False}},
        {"endpoint_url": "https://example.com/s3"},
        {**other, "config_kwargs": {"s3": {"addressing_style": "virtual"}}},
    ):
        with pytest.raises(UnsupportedError):
            address("songs", **refused)
