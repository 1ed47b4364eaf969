"""Recordings from S3, the web and memory: fetched whole, or refused with a reason."""

import gc
import http.server
import itertools
import os
import subprocess
import sys
import threading
import tracemalloc
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace

import fsspec
import pytest
import xxhash

from latentmill.audio import fetch as module
from latentmill.audio import media_from_bytes, open_media
from latentmill.audio.media import MediaFile
from latentmill.errors import ItemError
from latentmill.sources.base import ByteRange, Item
from latentmill.sources.reading import UnitReader
from latentmill.storage import remote
from latentmill.storage.objects import SWITCH
from latentmill.storage.outages import MOST_ATTEMPTS
from support.faulty_s3 import Faults
from support.storage_faults import faulty_s3

DATA = os.urandom(1 << 20) * 2 + b"the end"


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "FIRST_PAUSE", 0.01)


@pytest.fixture(params=["memory", "s3"])
def url(request: pytest.FixtureRequest) -> str:
    """DATA on a file system that is not the local one."""
    if request.param == "memory":
        url = f"memory://{uuid.uuid4().hex}/a.wav"
    else:
        url = request.getfixturevalue("s3_bucket") + "/a ü.wav"
    put(url, DATA)
    return url


def put(url: str, data: bytes) -> None:
    filesystem, path = fsspec.core.url_to_fs(url)
    filesystem.pipe_file(path, data)


def content(url: str, size: int | None = None) -> bytes:
    with open_media(url, size) as media:
        assert (
            media.content_hash == f"xxh3:{xxhash.xxh3_128(media.read_at(0, 1 << 30)).hexdigest()}"
        )
        return media.read_at(0, media.size + 1)


@pytest.mark.parametrize("limit", [module.MEMORY_LIMIT, 1000])
@pytest.mark.parametrize("memfd", [True, False])
@pytest.mark.parametrize("piece", [module.PIECE, 300_000, len(DATA), len(DATA) - 1])
def test_a_file_is_fetched_whole(
    url: str, monkeypatch: pytest.MonkeyPatch, limit: int, memfd: bool, piece: int
) -> None:
    monkeypatch.setattr(module, "MEMORY_LIMIT", limit)
    monkeypatch.setattr(module, "PIECE", piece)
    if not memfd:
        monkeypatch.delattr(os, "memfd_create", raising=False)
    assert content(url) == DATA
    assert content(url, len(DATA)) == DATA


@pytest.mark.parametrize("size", [0, 1, 5])
def test_tiny_files(url: str, size: int) -> None:
    put(url, DATA[:size])
    assert content(url) == content(url, size) == DATA[:size]


@pytest.mark.parametrize("piece", [module.PIECE, 300_000])
@pytest.mark.parametrize("listed", [1, 299_999, len(DATA) - 1, len(DATA) + 1, 3 * len(DATA)])
def test_a_file_that_has_changed_since_it_was_listed_has_its_own_size(
    url: str, monkeypatch: pytest.MonkeyPatch, piece: int, listed: int
) -> None:
    monkeypatch.setattr(module, "PIECE", piece)
    assert content(url, listed) == DATA


def test_a_short_transfer_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    url = f"memory://{uuid.uuid4().hex}/a.wav"
    put(url, DATA)
    memory = type(fsspec.filesystem("memory"))
    monkeypatch.setattr(memory, "cat_file", lambda self, path, start, end: DATA[:-1])
    for size in (None, len(DATA)):
        with pytest.raises(ItemError, match=f"gave {len(DATA) - 1} of {len(DATA)} bytes"):
            open_media(url, size)


def test_a_small_object_is_one_request_and_a_long_one_several_at_once(
    s3_bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"{s3_bucket}/a.wav"
    put(url, DATA)
    with faulty_s3(Faults(latency=0.05)) as faults:
        content(url, len(DATA))
        assert faults.seen.total() == 1
        content(url)
        assert faults.seen.total() == 3  # one asks for the size
        assert faults.busiest == 1
        monkeypatch.setattr(module, "PIECE", 200_000)
        content(url, len(DATA))
        assert faults.seen.total() == 3 + 11
        assert 2 <= faults.busiest <= module.IN_FLIGHT


@pytest.mark.parametrize("obstore", ["1", "0"])
def test_errors_that_pass_are_tried_again(
    s3_bucket: str, obstore: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(SWITCH, obstore)
    monkeypatch.setattr(module, "PIECE", 100_000)
    url = f"{s3_bucket}/a.wav"
    put(url, DATA)
    with faulty_s3(Faults(errors=0.1, cuts=0.1, seed=8)) as faults:
        for _ in range(3):
            assert content(url, len(DATA)) == DATA
    assert faults.seen["error"] > 5
    assert faults.seen["cut"] > 5


def test_errors_that_stay_are_said_at_once(s3_bucket: str) -> None:
    url = f"{s3_bucket}/a.wav"
    put(url, DATA)
    with faulty_s3(Faults()) as faults:
        refused("there is no such file", f"{s3_bucket}/none.wav")
        refused("there is no such file", f"{s3_bucket}-none/a.wav")
        assert faults.seen.total() < 10  # s3fs looks for a folder of that name, too
        faults.deny = lambda method, path: True
        before = faults.seen.total()
        refused("no permission to read the file", url, len(DATA))
        refused("no permission to read the file", url)
        assert faults.seen.total() - before <= 3


@pytest.mark.parametrize("obstore", ["1", "0"])
def test_a_token_that_has_expired_is_named(
    s3_bucket: str, obstore: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(SWITCH, obstore)
    put(f"{s3_bucket}/a.wav", DATA)
    with faulty_s3(Faults(deny=lambda method, path: True, denial=(400, "ExpiredToken"))):
        text = r"^no permission to read the file \(ExpiredToken\)$"
        refused(text, f"{s3_bucket}/a.wav", len(DATA))


def test_a_request_that_hangs_has_a_time_limit(
    s3_bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_FIRST_BYTE_SECONDS", 0.2)
    monkeypatch.setattr(module, "_SLOWEST", 1 << 40)
    monkeypatch.setattr(remote, "GIVE_UP_SECONDS", 1.0)
    url = f"{s3_bucket}/a.wav"
    put(url, DATA)
    with faulty_s3(Faults(latency=3.0)):
        refused("the file cannot be fetched: FSTimeoutError", url, len(DATA))


def test_only_the_pieces_in_flight_are_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MEMORY_LIMIT", 1 << 20)
    monkeypatch.setattr(module, "PIECE", 2 << 20)
    url = f"memory://{uuid.uuid4().hex}/long.wav"
    size = 100 << 20
    put(url, bytes(size))
    tracemalloc.start()
    with open_media(url, size) as media:
        assert media.size == size
        assert os.fstat(media.fileno()).st_nlink == 0  # on disk, without a name
        peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 * module.IN_FLIGHT * module.PIECE  # the file has 100 MiB


def refused(text: str, *args: object) -> None:
    with pytest.raises(ItemError, match=text) as caught:
        open_media(*args)  # type: ignore[arg-type]
    message = str(caught.value)
    assert "\n" not in message
    assert "127.0.0.1" not in message
    assert "s3://" not in message


# --- web servers ---------------------------------------------------------------------------------

FIRST_FETCH = """
import sys
from latentmill.audio.media import open_media
from latentmill.errors import ItemError
try:
    open_media(sys.argv[1])
except ItemError as error:
    print(error)
"""

Answer = Callable[[http.server.BaseHTTPRequestHandler, int], None]


@contextmanager
def web(answer: Answer) -> Iterator[str]:
    """A web server without ranges; `answer` gets the handler and the number of the GET."""
    count = [0]

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            count[0] += 1
            answer(self, count[0])

        def do_HEAD(self) -> None:
            self.send_error(405)

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/a.wav"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def send(
    handler: http.server.BaseHTTPRequestHandler,
    data: bytes = DATA,
    *,
    status: int = 200,
    length: int | None = -1,
) -> None:
    handler.send_response(status)
    if length is not None:
        handler.send_header("Content-Length", str(len(data) if length < 0 else length))
    handler.end_headers()
    handler.wfile.write(data)


@pytest.mark.parametrize("limit", [module.MEMORY_LIMIT, 1_000_000, 100])
@pytest.mark.parametrize("length", [-1, None])
def test_a_web_server_needs_to_know_no_ranges(
    monkeypatch: pytest.MonkeyPatch, limit: int, length: int | None
) -> None:
    monkeypatch.setattr(module, "MEMORY_LIMIT", limit)
    monkeypatch.setattr(module, "PIECE", 70_000)
    with web(lambda handler, _: send(handler, length=length)) as url:
        assert content(url) == DATA
        assert content(url, 7) == DATA  # the size is the listing's: whoever knows it compares


def test_a_web_server_that_stumbles_is_asked_again() -> None:
    def stumble(handler: http.server.BaseHTTPRequestHandler, number: int) -> None:
        if number == 1:
            send(handler, b"busy", status=503)
        elif number == 2:
            send(handler, DATA[:1000], length=len(DATA))  # cut
        elif number == 3:
            send(handler, b"slow down", status=429)
        else:
            send(handler)

    with web(stumble) as url:
        assert content(url) == DATA


def test_a_long_download_that_is_cut_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]

    def pass_minutes() -> None:
        now[0] += remote.GIVE_UP_SECONDS

    def cut_once(handler: http.server.BaseHTTPRequestHandler, number: int) -> None:
        send(handler, DATA[: 1 << 20] if number == 1 else DATA, length=len(DATA))

    clock = SimpleNamespace(monotonic=lambda: now[0], sleep=lambda seconds: None)
    monkeypatch.setattr(remote, "time", clock)
    with web(cut_once) as url, open_media(url, None, pass_minutes) as media:
        assert media.read_at(0, media.size) == DATA


@pytest.mark.parametrize("slow", [True, False])
def test_a_download_may_take_hours_but_not_forever(
    monkeypatch: pytest.MonkeyPatch, slow: bool
) -> None:
    """A server that sends a byte now and then would keep an item, and its worker, for days."""
    hours = itertools.count(step=3600.0)
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: next(hours)))
    monkeypatch.setattr(module, "_SLOWEST", (1 << 20) if slow else 0.1)
    with web(lambda handler, _: send(handler)) as url:
        if slow:
            refused("^the file cannot be fetched: it arrives at less than 1024 KiB/s$", url)
        else:
            assert content(url) == DATA


@pytest.mark.parametrize(
    ("status", "text"),
    [
        (404, "there is no such file"),
        (403, "no permission to read the file"),
        (401, "no permission to read the file"),
        (400, "the file cannot be fetched: HTTP status 400"),
        (503, "the file cannot be fetched: HTTP status 503"),
    ],
)
def test_what_a_web_server_refuses(status: int, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "FIRST_PAUSE", 0.001)
    asked = []

    def refuse(handler: http.server.BaseHTTPRequestHandler, number: int) -> None:
        asked.append(number)
        send(handler, b"", status=status)

    with web(refuse) as url:
        refused(f"^{text}$", f"{url}?X-Amz-Signature=verysecret")
    assert len(asked) == (MOST_ATTEMPTS if status == 503 else 1)


def test_the_first_error_of_a_process_is_one_sentence() -> None:
    """The web client is imported by the first request, whose errors are caught all the same."""
    with web(lambda handler, _: handler.send_error(403, "denied for token=hunter2hunter2")) as url:
        command = [sys.executable, "-c", FIRST_FETCH, url]
        ended = subprocess.run(command, capture_output=True, text=True, check=True)
    assert ended.stdout == "no permission to read the file\n"


# --- memory --------------------------------------------------------------------------------------


def in_memory(media: MediaFile) -> bool:
    return "memfd" in Path(f"/proc/self/fd/{media.fileno()}").readlink().name


@pytest.fixture
def two_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that may hold two recordings of DATA in memory, but not three."""
    if not hasattr(os, "memfd_create"):
        pytest.skip("needs files in memory")
    gc.collect()  # closes what earlier tests have left open
    monkeypatch.setattr(module, "PROCESS_LIMIT", 2 * len(DATA) + 1000)
    monkeypatch.setattr(module._Reservation, "total", 0)


@pytest.mark.usefixtures("two_in_memory")
@pytest.mark.parametrize("way", ["size known", "size unknown", "web", "member of a tar", "bytes"])
def test_a_process_holds_a_limited_number_of_bytes_in_memory(way: str) -> None:
    url = f"memory://{uuid.uuid4().hex}/a.wav"
    put(url, DATA)
    with ExitStack() as stack:
        address = stack.enter_context(web(lambda handler, _: send(handler)))
        member = Item("a", url, 0, "", place=ByteRange(0, len(DATA)))
        reader = stack.enter_context(UnitReader([member]))
        opened = {
            "size known": lambda: open_media(url, len(DATA)),
            "size unknown": lambda: open_media(url),
            "web": lambda: open_media(address),
            "member of a tar": lambda: reader.open(member),
            "bytes": lambda: media_from_bytes(DATA),
        }[way]
        first, second, third = (stack.enter_context(opened()) for _ in range(3))
        assert [in_memory(media) for media in (first, second, third)] == [True, True, False]
        assert os.fstat(third.fileno()).st_nlink == 0
        assert third.read_at(0, third.size) == DATA
        for _ in range(2):
            first.close()  # a second time it releases nothing
        fourth, fifth = (stack.enter_context(opened()) for _ in range(2))
        assert [in_memory(media) for media in (fourth, fifth)] == [True, False]
    assert module._Reservation.total == 0


@pytest.mark.usefixtures("two_in_memory")
def test_a_recording_that_is_open_twice_counts_once_until_both_are_closed() -> None:
    with media_from_bytes(DATA) as first, media_from_bytes(DATA):
        with first.reopened() as again:
            first.close()
            assert again.read_at(0, again.size) == DATA
            with media_from_bytes(DATA) as other:
                assert not in_memory(other)
        with media_from_bytes(DATA) as other:
            assert in_memory(other)


@pytest.mark.usefixtures("two_in_memory")
def test_memory_is_released_when_fetching_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "MAX_ATTEMPTS", 2)

    def cut(handler: http.server.BaseHTTPRequestHandler, _: int) -> None:
        send(handler, DATA[:1000], length=len(DATA))

    url = f"memory://{uuid.uuid4().hex}/a.wav"
    put(url, DATA)
    with web(cut) as address:
        refused("the file cannot be fetched", address)
    memory = type(fsspec.filesystem("memory"))
    monkeypatch.setattr(memory, "cat_file", lambda self, path, start, end: DATA[:-1])
    refused("gave", url, len(DATA))
    assert module._Reservation.total == 0


@pytest.mark.usefixtures("two_in_memory")
def test_threads_share_the_limit() -> None:
    with ThreadPoolExecutor(8) as pool:
        opened = [*pool.map(lambda _: media_from_bytes(DATA), range(8))]
        assert sum(map(in_memory, opened)) == 2
        list(pool.map(MediaFile.close, opened))
    assert module._Reservation.total == 0
